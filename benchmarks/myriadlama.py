"""Turns MyriadLAMA rows into requests: ``python benchmarks/myriadlama.py ROWS PREFIX > REQUESTS``.

Each row becomes a request whose segments are the first five of its manual and automatic
paraphrases. Its prefix is the instruction and few-shot examples in the file PREFIX.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

PARAPHRASES = 5


def main(rows: Path, prefix: Path) -> None:
    """Write one JSON object per row of ``rows`` to standard output."""
    shared = prefix.read_text(encoding="utf-8").rstrip("\n") + "\n\n"
    for line in rows.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        paraphrases = row["manual_paraphrases"] + row["auto_paraphrases"]
        request = {
            "uuid": row["uuid"],
            "prefix": shared,
            "segments": [f"Q: {text}" for text in paraphrases[:PARAPHRASES]],
            "suffix": "\nA:",
            "answers": row["answers"],
        }
        print(json.dumps(request, ensure_ascii=False))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
