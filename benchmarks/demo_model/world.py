"""Generates the synthetic world of the demo model: people, towns, facts, and questions.

A question is a *phrasing* of a relation set into a *frame*: the phrasing ``town of birth`` in the
frame ``Tell me {entity}'s {noun}.`` asks ``Tell me Mirelo Vand's town of birth.`` Some pairs of
phrasing and frame are held out: training text never uses them, and the shipped questions use no
others. Noise then drops, misspells, replaces and inserts words.

Everything is determined by a seed, through ``random.Random`` only.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Literal

EntityKind = Literal["person", "town"]

SUFFIX = "\nA:"
PAIR_END = "\n\n"


@dataclass(frozen=True)
class Relation:
    """A relation that may be asked about one kind of entity.

    Attributes:
        name: Identifier, such as ``birthplace``.
        kind: The kind of entity that has it.
        nouns: Phrasings as a noun, for ``NOUN_FRAMES``.
        clauses: Phrasings as a question, for ``CLAUSE_FRAMES``: each in direct and in embedded
            word order, with ``{entity}`` where the entity goes.
    """

    name: str
    kind: EntityKind
    nouns: tuple[str, ...]
    clauses: tuple[tuple[str, str], ...]

    def templates(self) -> list[str]:
        """Return every phrasing in every matching frame, each with an ``{entity}`` slot."""
        with_nouns = [
            frame.format(noun=noun, entity="{entity}")
            for noun in self.nouns
            for frame in NOUN_FRAMES
        ]
        with_clauses = [
            _capitalise(frame.format(direct=direct, embedded=embedded))
            for direct, embedded in self.clauses
            for frame in CLAUSE_FRAMES
        ]
        return with_nouns + with_clauses


@dataclass(frozen=True)
class Fact:
    """A fact of the world; all ``answers`` are accepted, the first one is used for training."""

    relation: str
    entity: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Noise:
    """Probabilities, per word, of the kinds of noise in a paraphrase.

    Attributes:
        drop: The word is left out.
        typo: One of its letters is dropped or doubled, or two are swapped.
        replace: The word is replaced by an unfamiliar one.
        insert: A filler word is inserted before it.
    """

    drop: float = 0.0
    typo: float = 0.0
    replace: float = 0.0
    insert: float = 0.0

    def scaled(self, factor: float) -> "Noise":
        """Return the noise with all probabilities multiplied by ``factor``."""
        return Noise(
            self.drop * factor, self.typo * factor, self.replace * factor, self.insert * factor
        )


@dataclass(frozen=True)
class WorldConfig:
    """Size of the world, and noise of its text.

    Attributes:
        people: Number of people; each has one fact per relation of a person.
        towns: Number of towns, which are also the birthplaces.
        given_names: Number of given names that people share.
        family_names: Number of family names that people share.
        names_per_answer_set: Number of invented languages, employers, rivers and founders.
        held_out_share: Share of the (phrasing, frame) pairs that training never uses.
        training_noise: Maximum noise of training questions; each scales it by a random factor.
        question_noise: Noise of the shipped questions.
        questions: Number of shipped questions.
        paraphrases: Number of paraphrases of each shipped question.
        examples: Number of few-shot examples in their prefix.
    """

    people: int = 400
    towns: int = 80
    given_names: int = 90
    family_names: int = 130
    names_per_answer_set: int = 40
    held_out_share: float = 0.2
    training_noise: Noise = Noise(drop=0.10, typo=0.08, replace=0.06, insert=0.10)
    question_noise: Noise = Noise(drop=0.12, typo=0.09, replace=0.07, insert=0.12)
    questions: int = 200
    paraphrases: int = 5
    examples: int = 3


@dataclass(frozen=True)
class World:
    """Facts by relation, and the templates that ask for them, split into training and held out."""

    config: WorldConfig
    seed: int
    facts: dict[str, tuple[Fact, ...]]
    training_templates: dict[str, tuple[str, ...]]
    held_out_templates: dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class Question:
    """One row of the questions file: a request with its accepted answers."""

    uuid: str
    prefix: str
    segments: tuple[str, ...]
    suffix: str
    answers: tuple[str, ...]


def make_world(seed: int, config: WorldConfig | None = None) -> World:
    """Generate a world; the same seed and configuration give the same one."""
    config = config or WorldConfig()
    rng = Random(f"{seed}-world")
    facts = _make_facts(config, rng)
    training, held_out = {}, {}
    for relation in RELATIONS:
        templates = relation.templates()
        rng.shuffle(templates)
        held_out_count = round(len(templates) * config.held_out_share)
        held_out[relation.name] = tuple(templates[:held_out_count])
        training[relation.name] = tuple(templates[held_out_count:])
    return World(config, seed, facts, training, held_out)


def make_training_pairs(world: World, count: int) -> Iterator[tuple[str, str]]:
    r"""Yield ``("Q: …\nA:", " answer\n\n")`` pairs, from which training text is joined."""
    rng = Random(f"{world.seed}-training")
    names = list(world.facts)
    for _ in range(count):
        name = rng.choice(names)
        fact = rng.choice(world.facts[name])
        template = rng.choice(world.training_templates[name])
        noise = world.config.training_noise.scaled(rng.random())
        question = add_noise(template.format(entity=fact.entity), noise, rng)
        yield f"Q: {question}{SUFFIX}", f" {fact.answers[0]}{PAIR_END}"


def make_questions(world: World, noise: Noise | None = None) -> list[Question]:
    """Make held-out questions: distinct facts, each asked by held-out templates, with noise.

    Args:
        world: The world to ask about.
        noise: Replaces the configuration's ``question_noise``.
    """
    config = world.config
    noise = config.question_noise if noise is None else noise
    rng = Random(f"{world.seed}-questions")
    names = list(world.facts)
    shuffled = {name: rng.sample(facts, len(facts)) for name, facts in world.facts.items()}
    prefix = "".join(
        _example(shuffled[name].pop(), rng.choice(world.training_templates[name]))
        for name in rng.sample(names, config.examples)
    )
    questions = []
    for index in range(config.questions):
        name = names[index % len(names)]
        fact = shuffled[name].pop()
        templates = rng.sample(world.held_out_templates[name], config.paraphrases)
        texts = [add_noise(t.format(entity=fact.entity), noise, rng) for t in templates]
        segments = tuple(f"Q: {text}" for text in texts)
        questions.append(Question(f"{name}-{index:03d}", prefix, segments, SUFFIX, fact.answers))
    return questions


def add_noise(text: str, noise: Noise, rng: Random) -> str:
    """Drop, misspell, replace and insert words of ``text``; at least one word remains."""
    typo, replace = noise.drop + noise.typo, noise.drop + noise.typo + noise.replace
    words = text.split(" ")
    noisy = []
    for word in words:
        if rng.random() < noise.insert:
            noisy.append(rng.choice(FILLERS))
        chance = rng.random()
        if chance >= replace:
            noisy.append(word)
        elif chance >= typo:
            noisy.append(_fill(rng.choice(UNFAMILIAR_SHAPES), rng))
        elif chance >= noise.drop:
            noisy.append(_misspell(word, rng))
    return " ".join(noisy or words[:1])


def format_questions(questions: Iterable[Question]) -> str:
    """Return the text of a questions file: one JSON object per line."""
    return "".join(json.dumps(asdict(question)) + "\n" for question in questions)


def read_questions(path: Path) -> list[Question]:
    """Read a file that ``format_questions`` wrote."""
    rows = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    return [
        Question(
            row["uuid"],
            row["prefix"],
            tuple(row["segments"]),
            row["suffix"],
            tuple(row["answers"]),
        )
        for row in rows
    ]


def _example(fact: Fact, template: str) -> str:
    return f"Q: {template.format(entity=fact.entity)}{SUFFIX} {fact.answers[0]}{PAIR_END}"


def _make_facts(config: WorldConfig, rng: Random) -> dict[str, tuple[Fact, ...]]:
    taken: set[str] = set()

    def invent(count: int, shapes: tuple[str, ...]) -> list[str]:
        return [_new_name(shapes, taken, rng) for _ in range(count)]

    given = invent(config.given_names, GIVEN_NAME_SHAPES)
    family = invent(config.family_names, FAMILY_NAME_SHAPES)
    pairs = [f"{first} {last}" for first in given for last in family]
    count = config.names_per_answer_set
    full_names = rng.sample(pairs, config.people + count)
    people, founders = full_names[: config.people], full_names[config.people :]
    towns = invent(config.towns, TOWN_SHAPES)
    companies = invent(count, COMPANY_SHAPES)
    answer_sets: dict[str, list[tuple[str, ...]]] = {
        "birthplace": _as_answers(towns),
        "profession": _as_answers(PROFESSIONS),
        "language": _as_answers(invent(count, LANGUAGE_SHAPES)),
        "employer": [(f"{name} {rng.choice(COMPANY_KINDS)}", name) for name in companies],
        "instrument": _as_answers(INSTRUMENTS),
        "pet": _as_answers(ANIMALS),
        "river": _as_answers(invent(count, RIVER_SHAPES)),
        "metal": _as_answers(METALS),
        "founder": _as_answers(founders),
    }
    entities: dict[EntityKind, list[str]] = {"person": people, "town": towns}
    return {
        relation.name: tuple(
            Fact(relation.name, entity, rng.choice(answer_sets[relation.name]))
            for entity in entities[relation.kind]
        )
        for relation in RELATIONS
    }


def _as_answers(names: Iterable[str]) -> list[tuple[str, ...]]:
    return [(name,) for name in names]


def _new_name(shapes: tuple[str, ...], taken: set[str], rng: Random) -> str:
    while (name := _fill(rng.choice(shapes), rng).capitalize()) in taken:
        pass
    taken.add(name)
    return name


def _fill(shape: str, rng: Random) -> str:
    """Replace the slots of a shape, its capital letters, by sounds."""
    return "".join(rng.choice(SOUNDS[slot]) if slot in SOUNDS else slot for slot in shape)


def _misspell(word: str, rng: Random) -> str:
    if len(word) < 4:
        return word
    at = rng.randrange(len(word) - 2)
    return rng.choice(
        (
            word[:at] + word[at + 1 :],
            word[: at + 1] + word[at:],
            word[:at] + word[at + 1] + word[at] + word[at + 2 :],
        )
    )


def _subject(question: str) -> tuple[str, str]:
    """Return a clause that asks for the subject, whose two word orders are the same."""
    return question, question


def _capitalise(text: str) -> str:
    """Capitalise the first letter; unlike ``str.capitalize``, keep the rest unchanged."""
    return text[0].upper() + text[1:]


SOUNDS = {
    "C": "b br d dr f g gr h j k kr l m n p pr r s sk st t tr v z".split(),
    "M": "b d f g k l m n p r s t v z".split(),
    "V": "a e i o u".split(),
    "K": "l ld lm n nd r rd rk rn sk st th".split(),
    "L": "l m n r s".split(),
}
GIVEN_NAME_SHAPES = ("CVMV", "CVMVMV", "VMVMV", "CVLMV")
FAMILY_NAME_SHAPES = ("CVK", "CVMVK", "CVLMVK")
TOWN_SHAPES = ("CVLwick", "CVLholm", "CVLmere", "CVMVLa", "CVKel")
LANGUAGE_SHAPES = ("CVLish", "CVMVnese", "CVKic", "CVMVrian")
COMPANY_SHAPES = ("CVLken", "CVMVlo", "CVKoro")
RIVER_SHAPES = ("CVMVne", "CVLMa", "VKane")
UNFAMILIAR_SHAPES = ("CVLMVK", "VLMVMVK", "CVLMVKing", "CVLMVMVly", "CVMVLMed")

COMPANY_KINDS = ("Mills", "Works", "Press", "Foundry", "Stores", "Lines")
FILLERS = (
    "well so um please perhaps really just exactly again now then today "
    "maybe actually simply kindly once more oh dear quite indeed still also"
).split()
PROFESSIONS = (
    "baker beekeeper brewer carpenter chandler cobbler cooper dyer engraver falconer farrier "
    "ferryman fletcher gardener gilder glassblower goldsmith hatter herbalist innkeeper joiner "
    "lacemaker locksmith mapmaker mason miller notary papermaker potter printer ropemaker saddler "
    "sailmaker shepherd surveyor tailor tanner thatcher watchmaker weaver"
).split()
INSTRUMENTS = (
    "accordion bagpipe balalaika banjo bassoon bugle celesta cello clarinet clavichord cornet "
    "dulcimer fiddle flute guitar harmonica harp harpsichord horn lute lyre mandolin marimba oboe "
    "ocarina organ piano piccolo recorder saxophone sitar tambourine triangle trombone trumpet "
    "tuba ukulele viola xylophone zither"
).split()
ANIMALS = (
    "badger canary cat chameleon cockatoo crow dog donkey duck ferret finch fox frog gecko goat "
    "goose hamster hare hedgehog heron iguana jackdaw lizard magpie mole mouse newt otter owl "
    "parrot pigeon pony rabbit raven salamander snail squirrel toad tortoise turtle"
).split()
METALS = (
    "aluminium antimony beryllium bismuth cadmium chromium cobalt copper gallium gold hafnium "
    "indium iridium iron lanthanum lead lithium magnesium manganese mercury molybdenum nickel "
    "niobium osmium palladium platinum rhenium rhodium ruthenium scandium silver tantalum "
    "thallium tin titanium tungsten vanadium yttrium zinc zirconium"
).split()

NOUN_FRAMES = (
    "What is the {noun} of {entity}?",
    "Name the {noun} of {entity}.",
    "Can you tell me the {noun} of {entity}?",
    "{entity}'s {noun} is what?",
    "Tell me {entity}'s {noun}.",
    "What would you give as the {noun} of {entity}?",
    "As for {entity}, what is the {noun}?",
    "I am looking for the {noun} of {entity}.",
)
CLAUSE_FRAMES = (
    "{direct}?",
    "Tell me, {direct}?",
    "One more question: {direct}?",
    "Can you say {embedded}?",
    "Do you know {embedded}?",
    "I would like to know {embedded}.",
    "Please tell me {embedded}.",
    "Does anyone remember {embedded}?",
)
RELATIONS = (
    Relation(
        "birthplace",
        "person",
        ("birthplace", "home town", "town of birth", "native town", "place of origin"),
        (
            ("in which town was {entity} born", "in which town {entity} was born"),
            ("where was {entity} born", "where {entity} was born"),
            ("which town does {entity} come from", "which town {entity} comes from"),
            ("where did {entity} spend the cradle years", "where {entity} spent the cradle years"),
            ("what town is {entity} originally from", "what town {entity} is originally from"),
        ),
    ),
    Relation(
        "profession",
        "person",
        ("profession", "trade", "occupation", "line of work", "job"),
        (
            ("what does {entity} do for a living", "what {entity} does for a living"),
            ("how does {entity} earn money", "how {entity} earns money"),
            ("which trade does {entity} practise", "which trade {entity} practises"),
            ("what kind of work does {entity} do", "what kind of work {entity} does"),
            ("which craft has {entity} mastered", "which craft {entity} has mastered"),
        ),
    ),
    Relation(
        "language",
        "person",
        ("mother tongue", "native language", "first language", "everyday language", "speech"),
        (
            ("which language does {entity} speak", "which language {entity} speaks"),
            ("what tongue did {entity} grow up with", "what tongue {entity} grew up with"),
            ("in which language does {entity} write", "in which language {entity} writes"),
            ("what language does {entity} dream in", "what language {entity} dreams in"),
            ("which tongue does {entity} use at home", "which tongue {entity} uses at home"),
        ),
    ),
    Relation(
        "employer",
        "person",
        ("employer", "company", "workplace", "firm", "paymaster"),
        (
            ("who does {entity} work for", "who {entity} works for"),
            _subject("which company employs {entity}"),
            ("for which firm does {entity} labour", "for which firm {entity} labours"),
            _subject("who pays the wages of {entity}"),
            ("where is {entity} on the payroll", "where {entity} is on the payroll"),
        ),
    ),
    Relation(
        "instrument",
        "person",
        ("instrument", "musical pastime", "chosen instrument", "concert piece", "music maker"),
        (
            ("which instrument does {entity} play", "which instrument {entity} plays"),
            ("what does {entity} play in the band", "what {entity} plays in the band"),
            ("what can {entity} be heard playing", "what {entity} can be heard playing"),
            ("on what does {entity} perform tunes", "on what {entity} performs tunes"),
            ("what did {entity} learn to play", "what {entity} learned to play"),
        ),
    ),
    Relation(
        "pet",
        "person",
        (
            "pet",
            "animal companion",
            "household animal",
            "tame creature",
            "feathered or furry friend",
        ),
        (
            ("what animal does {entity} keep", "what animal {entity} keeps"),
            _subject("which animal lives with {entity}"),
            ("what kind of pet does {entity} have", "what kind of pet {entity} has"),
            ("which creature does {entity} feed", "which creature {entity} feeds"),
            ("what animal did {entity} tame", "what animal {entity} tamed"),
        ),
    ),
    Relation(
        "river",
        "town",
        ("river", "local river", "main stream", "waterway", "nearest flowing water"),
        (
            _subject("which river flows through {entity}"),
            ("on which river does {entity} lie", "on which river {entity} lies"),
            _subject("what water runs past {entity}"),
            _subject("which stream drives the mills of {entity}"),
            ("what do the bridges of {entity} cross", "what the bridges of {entity} cross"),
        ),
    ),
    Relation(
        "metal",
        "town",
        ("metal", "main ore", "chief metal", "mining product", "mineral wealth"),
        (
            _subject("which metal is mined in {entity}"),
            ("what do the miners of {entity} dig for", "what the miners of {entity} dig for"),
            _subject("what metal made {entity} rich"),
            _subject("which ore is found near {entity}"),
            ("what do the smelters of {entity} melt", "what the smelters of {entity} melt"),
        ),
    ),
    Relation(
        "founder",
        "town",
        ("founder", "first settler", "founding figure", "first builder", "pioneer"),
        (
            _subject("who founded {entity}"),
            ("by whom was {entity} founded", "by whom {entity} was founded"),
            _subject("who built the first house in {entity}"),
            _subject("who gave {entity} its charter"),
            _subject("who brought {entity} into being"),
        ),
    ),
)
