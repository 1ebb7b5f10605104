/** Tile states, as flexmask.block_mask.tile_states numbers them. */
const EMPTY = 0;
const PARTIAL = 1;
const FULL = 2;

/** The state of a pair. UNKNOWN: its tile is partial and the page does not hold its pairs. */
const MASKED = 0;
const SEEN = 1;
const UNKNOWN = 2;

function bytesOf(base64) {
  return Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
}

/** One mask over `size` tokens: states of tiles, and bitmaps of those that are partial. */
class TileMask {
  constructor(layer, size, tile) {
    this.name = layer.name;
    this.colour = layer.colour;
    this.size = size;
    this.tile = tile;
    this.tiles = Math.ceil(size / tile);
    this.states = bytesOf(layer.states);
    this.bitmaps = layer.bitmaps.map(bytesOf);
    const numbers = new Int32Array(bytesOf(layer.bitmapOfTile).buffer);
    /** Index of each partial tile → number of its bitmap, -1 if the page holds none. */
    this.bitmapOf = new Map();
    this.states.forEach((state, index) => {
      if (state === PARTIAL) this.bitmapOf.set(index, numbers[this.bitmapOf.size]);
    });
  }

  state(row, column) {
    return this.states[row * this.tiles + column];
  }

  pair(q, k) {
    const { tile } = this;
    const index = Math.floor(q / tile) * this.tiles + Math.floor(k / tile);
    const state = this.states[index];
    if (state !== PARTIAL) return state === FULL ? SEEN : MASKED;
    const bitmap = this.bitmaps[this.bitmapOf.get(index)];
    if (!bitmap) return UNKNOWN;
    const bit = (q % tile) * tile + (k % tile);
    return (bitmap[bit >> 3] >> (bit & 7)) & 1;
  }

  /** The states of the pairs of query `q`: MASKED, SEEN or UNKNOWN for each key. */
  keysOf(q) {
    return this.#along((k) => [q, k]);
  }

  /** The states of the pairs of key `k`, likewise. */
  queriesOf(k) {
    return this.#along((q) => [q, k]);
  }

  #along(pairAt) {
    const { size, tile } = this;
    const found = new Uint8Array(size);
    for (let start = 0; start < size; start += tile) {
      const [q, k] = pairAt(start);
      const state = this.state(Math.floor(q / tile), Math.floor(k / tile));
      const stop = Math.min(start + tile, size);
      if (state === FULL) found.fill(SEEN, start, stop);
      if (state !== PARTIAL) continue;
      for (let i = start; i < stop; i++) found[i] = this.pair(...pairAt(i));
    }
    return found;
  }
}

/** One strategy, or the difference of two, over the request. */
class Panel {
  constructor(data) {
    Object.assign(this, data);
    this.layers = data.layers.map((layer) => new TileMask(layer, data.size, data.tile));
    this.isDifference = this.layers.length > 1;
    this.positionOf = Panel.#unrolled(data.positions, data.size);
    this.originOf = data.origins.length ? Panel.#unrolled(data.origins, data.size) : null;
    this.bandOf = new Uint16Array(data.size);
    this.bands = data.bands.map(([label, colour, start, stop]) => ({ label, colour, start, stop }));
    this.bands.forEach((band, number) => this.bandOf.fill(number, band.start, band.stop));
    this.newTokens = data.size - data.promptTokens;
  }

  static #unrolled(runs, size) {
    const numbers = new Int32Array(size);
    runs.forEach(([start, first], run) => {
      const stop = run + 1 < runs.length ? runs[run + 1][0] : size;
      for (let i = start; i < stop; i++) numbers[i] = first + i - start;
    });
    return numbers;
  }

  band(token) {
    return this.bands[this.bandOf[token]];
  }

  text(token) {
    return this.texts.length ? this.texts[token] : String(token);
  }

  /** The token of this panel that is `token` of another; of several copies, the one in the same part. */
  counterpart(other, token) {
    if (!this.originOf || !other.originOf) return Math.min(token, this.size - 1);
    const origin = other.originOf[token];
    const { label } = other.band(token);
    let found = -1;
    for (let i = 0; i < this.size; i++) {
      if (this.originOf[i] !== origin) continue;
      if (found < 0 || this.band(i).label === label) found = i;
    }
    return found;
  }
}
