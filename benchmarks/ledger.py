"""How long the whole ledger takes to verify: chain, hashes and signatures of 100,000 records on every core.

Builds a ledger of signed records in a folder that is thrown away, then times `verify_ledger`. JSON: rows,
verify_s (seconds of waiting), cores, processor seconds of all processes (cpu_s).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

if __name__ == "__main__":  # not in the processes that verify
    from imaging.vocabulary import Decision
    from registry.access import admit
    from registry.audit import verify_ledger
    from registry.database import open_database
    from registry.events import Event, digest_event
    from registry.ledger import Ledger

BODY = {"version": 3, "digest": "sha256:" + "0" * 64, "sites": ["north", "east"],
        "because": "The artefact rate doubled; the reader at the site asked for it."}  # fmt: skip


def write_records(ledger: Any, signer: Any, count: int) -> None:
    """Signed records after the last one, up to `count` in all."""
    (last,) = ledger.events(limit=1)
    with ledger.writing() as writer:
        for seq in range(last.seq + 1, count + 1):
            facts = (seq, last.at, (Decision.SUSPENDED, Decision.RESUMED)[seq % 2], "brain-tissue",
                     signer.actor, {**BODY, "version": seq}, signer.key_id, last.hash)  # fmt: skip
            digest = digest_event(Event(*facts, hash="", signature=""))
            last = Event(*facts, digest, signer.sign(digest.encode()))
            writer.insert(last)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="seconds: 10,000 records")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    asked = parser.parse_args()
    rows = 10_000 if asked.quick else 100_000
    with tempfile.TemporaryDirectory() as folder:
        engine = open_database(Path(folder) / "formulary.db", "registry")
        ledger = Ledger(engine, Path(folder) / "head.json")
        write_records(ledger, admit(Path(folder), ledger, "author@bench"), rows)
        start, used = time.perf_counter(), sum(os.times()[:4])
        verified = verify_ledger(engine)
        took, used = time.perf_counter() - start, sum(os.times()[:4]) - used
    told = {"rows": verified, "verify_s": round(took, 2), "cpu_s": round(used, 2), "cores": os.cpu_count()}
    print(json.dumps(told))
    if asked.json:
        asked.json.write_text(json.dumps(told) + "\n")


if __name__ == "__main__":
    main()
