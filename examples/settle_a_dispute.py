"""Settle a dispute: what the owner does before, what they claim, and what a judge finds.

    python examples/settle_a_dispute.py --tsa https://freetsa.org/tsr --roots freetsa.pem

`--tsa` is any timestamp authority that speaks RFC 3161, and `--roots` its root certificate in PEM,
which it offers for download. Without a network, `python tests/authority.py FOLDER` runs one on
this machine and prints both. The script writes into the folder `dispute`.

The coins come out of the authority's first timestamp, so the owner could not choose them. A judge
needs the claim, the suspect and the root certificate, and need not believe either side.
"""

import argparse
from pathlib import Path

import countermark as cm


def main() -> None:
    """Mark, steal, claim, judge."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tsa", required=True, help="address of a timestamp authority")
    parser.add_argument("--roots", required=True, help="PEM file of its root certificate")
    given = parser.parse_args()
    stamped = {"tsa": given.tsa, "roots": given.roots}
    work = Path("dispute")
    mine, copy, stranger = work / "mine", work / "copy", work / "stranger"

    # Before anything happens, the owner marks the model. Later nobody could say when.
    cm.protect("digits", out=mine, objective="standard", epochs=20, **stamped)
    # The thief prunes what they took. Somebody else has a model of the same kind.
    cm.remove(mine, out=copy, prune=0.3)
    cm.protect("digits", out=stranger, objective="standard", epochs=20, scheme="none", seed=1)

    # A claim opens one batch of trials. Against a stranger's model nothing is opened.
    try:
        cm.claim(stranger, key=mine / "key", out=work / "no-claim", **stamped)
    except cm.CountermarkError as error:
        print(f"claim against the stranger: {error}")
    claimed = cm.claim(copy, key=mine / "key", out=work / "claim", **stamped)
    print(f"claim against the copy: batch {claimed.batch} opened, {claimed.left} left")

    # The judge asks both models on their own machine, with the claim and the roots alone.
    for suspect in (copy, stranger):
        judged = cm.adjudicate(
            work / "claim",
            suspect=suspect,
            roots=given.roots,
            out=work / f"judgement-{suspect.name}",
        )
        print(f"judgement on the {suspect.name}: {judged.verdict}. {judged.sentence}")


if __name__ == "__main__":
    main()
