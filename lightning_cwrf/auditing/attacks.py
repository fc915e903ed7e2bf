"""Running the attacks of an audit."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightning_cwrf.attacks import Attack, Evidence, create_attacks


def chosen_attacks(attacks: Sequence[str | Attack] | None, *, with_shadows: bool) -> list[Attack]:
    """The attacks of an audit; None: the loss attack, and with shadow models LiRA and RMIA."""
    if attacks is None:
        attacks = ["loss", "lira", "rmia"] if with_shadows else ["loss"]
    return create_attacks(attacks)


def run_attacks(attacks: list[Attack], evidence: Evidence, *, asked: bool) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Scores of the attacks, and the reasons of those that failed.

    If the user ``asked`` for them by name, one that lacks evidence is an error. One that writes into it always is.
    """
    if asked:
        for attack in attacks:
            attack.check(evidence)
    scores, failures = {}, {}
    untouched = evidence.writes()
    for attack in attacks:
        try:
            scores[attack.name] = attack(evidence)
        except Exception as error:  # a user's own attack may raise anything
            if len(attacks) == 1:
                raise
            failures[attack.name] = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        changed = [name for name, count in evidence.writes().items() if count != untouched.get(name, 0)]
        if changed:
            raise ValueError(
                f"the {attack.name} attack changed the evidence's {', '.join(changed)} in place, which other attacks "
                "see too; let it work on a copy (.clone())."
            )
    return scores, failures
