"""The options of a hardening: scoring, rewinding, defense and Trainer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeGuard

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_cwrf.callbacks import (
    CriticalRewindCallback,
    DefenseCallback,
    GradientMaskCallback,
    PrivacyScoringCallback,
)
from lightning_cwrf.commands.base import UsageError
from lightning_cwrf.commands.loading import SILENT, Loaded
from lightning_cwrf.commands.objects import Named, checked_arguments, one_line, path_and_arguments
from lightning_cwrf.commands.progress import EpochLines, on_terminal
from lightning_cwrf.data import Batches
from lightning_cwrf.data.loading import some_batches
from lightning_cwrf.defenses import Defense, RelaxLoss, available_defenses, create_defense, defense_class
from lightning_cwrf.outputs import collect_outputs
from lightning_cwrf.recipes import ShadowRecipe
from lightning_cwrf.weights.selection import how_rewound
from lightning_cwrf.weights.trained import outcome

_KEPT = ("callbacks", "devices", "num_nodes", "strategy", "accelerator")


def add_training_options(parser: Any) -> None:
    """Reference data, vanilla weights, and how to score, rewind and fine-tune."""
    add_fine_tuning_options(parser)
    parser.add_argument(
        "--vanilla",
        type=str,
        help="the weights from before training: a file (VanillaSnapshotCallback writes one), 'redraw', or the import "
        "path of a function that returns the untrained module",
    )
    parser.add_argument("--rate", type=float, default=0.03, help="r, the share of the weights to rewind (0.01 to 0.10)")
    parser.add_argument(
        "--values",
        type=str,
        default="initial",
        help="what these are set to: initial, fresh (another draw, from --seed), zero, or trained (held as they are)",
    )
    parser.add_argument(
        "--hold", type=bool, default=True, help="hold them in the fine-tuning; false: train them on, as a control"
    )
    parser.add_argument(
        "--batchnorm",
        type=str,
        default="keep",
        help="BatchNorm's running statistics after rewinding: keep, reset, or estimate (one pass over the members)",
    )
    parser.add_argument(
        "--defense",
        type=Named,
        default="relaxloss",
        help=f"the loss of the fine-tuning: {', '.join(available_defenses())}; --defense.alpha 0.5 sets a setting "
        "(relaxloss: alpha is its strength; by default the finished model's loss on --reference)",
    )


def add_fine_tuning_options(parser: Any) -> None:
    """Reference data, how to score, and the Trainer of the fine-tuning."""
    parser.add_argument("--reference", type=Named, default="val", help="other data that it never saw, for the scoring")
    parser.add_argument("--lam", type=float, default=0.7, help="λ of the scoring (0.9 for 100 classes)")
    parser.add_argument("--steps", type=int, default=30, help="of the scoring")
    parser.add_argument("--max_epochs", type=int, default=40, help="of the fine-tuning")
    parser.add_argument(
        "--trainer",
        type=dict[str, Any],
        default={},
        help="further arguments of the Trainer: --trainer.gradient_clip_val 1.0",
    )


def repeated(arguments: dict[str, Any], loaded: Loaded) -> ShadowRecipe:
    """The recipe of a training of the model by a Trainer with these arguments, on the members.

    Raises:
        ValueError: the training cannot be repeated.
    """
    members: Any = loaded.members
    return ShadowRecipe.like(make_trainer(arguments, []), loaded.model, loader=members)


def explain_defenses() -> str:
    """The defenses and their settings, as they are registered now."""
    lines = []
    for name in available_defenses():
        cls = defense_class(name)
        settings = ", ".join(each for each in cls.__dataclass_fields__ if not each.startswith("_"))  # type: ignore[attr-defined]
        lines.append(f"  {name:<28} {settings or '-'}")
    return "\n".join(["defenses and their settings:", *lines])


LEVEL = "the finished model's loss on the reference data"


def needs_level(defense: Defense | None, options: Any) -> TypeGuard[RelaxLoss]:
    """Whether RelaxLoss has no ``alpha`` of the user's: then it is :data:`LEVEL`, where a hardening starts."""
    given = path_and_arguments("defense", options.defense, options.defense_args)[1]
    return isinstance(defense, RelaxLoss) and "alpha" not in given


def at_level(defense: RelaxLoss, model: LightningModule, reference: Batches, steps: int) -> RelaxLoss:
    """RelaxLoss with the model's loss on up to 10,000 of the reference data as its ``alpha``, to two digits.

    At that level, the loss on the members is what it is on data that the model never saw. Of a stream, the first
    ``steps`` batches are read.

    Raises:
        UsageError: the loss is not below that of guessing: labels are not true, or the model is sure of what is wrong.
    """
    found = collect_outputs(model, some_batches(reference, 10_000, steps), name="reference")
    measured = outcome(found.logits, found.targets)
    if not measured.loss < measured.guessing:
        raise UsageError(
            f"--defense.alpha is {LEVEL} where it is not given, and that is no use here: {measured}. Are the labels of "
            "--reference true? If so, or if it has none, pass --defense.alpha, such as a tenth of the loss of guessing."
        )
    return replace(defense, alpha=float(f"{measured.loss:.2g}"))


def fine_tuning(options: Any, defense: Defense | None, *, measured: bool = False) -> str:
    """How long and with which defense it is fine-tuned, and which options change that.

    ``measured``: RelaxLoss has its ``alpha`` from :func:`at_level`, where it needs one.
    """
    if defense is None:
        return f"{options.max_epochs} epochs without a defense"
    name, given = path_and_arguments("defense", options.defense, options.defense_args)
    settings = defense.plain()
    values = {each: f"{value}{'' if each in given else ' (default)'}" for each, value in settings.items()}
    if needs_level(defense, options):
        values["alpha"] = f"{settings['alpha']} ({LEVEL})" if measured else LEVEL
    told = [f"{each} = {value}" for each, value in values.items()]
    change = ", ".join(["--max_epochs", *(f"--defense.{each}" for each in settings)])
    return f"{options.max_epochs} epochs with {name}{''.join(f', {each}' for each in told)}; change it with {change}"


def defense_of(options: Any, loaded: Loaded) -> Defense:
    """The defense with its settings; data settings are splits or import paths."""
    name, settings = path_and_arguments("defense", options.defense, options.defense_args)
    try:
        data = defense_class(name).data_names()
        for each in data:
            if isinstance(settings.get(each), (str, dict)):
                path, arguments = path_and_arguments(f"defense.{each}", settings[each], {})
                settings[each] = loaded.source.named(f"defense.{each}", path, arguments)
        if isinstance(settings.get("on"), str):
            settings["on"] = create_defense(settings["on"])
        return create_defense(name, **settings)
    except (TypeError, ValueError) as error:
        raise UsageError(f"--defense {name}: {one_line(error)}") from error


def cwrf_callbacks(options: Any, reference: Batches, members: Batches | None, vanilla: Any) -> list[Callback]:
    """Scoring, rewinding and, unless ``--hold false``, freezing."""
    if vanilla is None:
        raise UsageError(
            "--vanilla is missing: pass the weights from before training (a file of VanillaSnapshotCallback), or "
            "'redraw' to draw new ones."
        )
    rewind = CriticalRewindCallback(
        rate=options.rate,
        values=options["values"],
        hold=options.hold,
        batchnorm=options.batchnorm,
        seed=options.seed if options["values"] == "fresh" else None,
    )
    scoring = PrivacyScoringCallback(reference, vanilla, lam=options.lam, steps=options.steps, members=members)
    return [scoring, rewind, GradientMaskCallback()] if options.hold else [scoring, rewind]


def rewinding(options: Any) -> str:
    """What is done to the chosen weights, without what is so by default.

    >>> rewinding({"rate": 0.03, "values": "fresh", "hold": False, "batchnorm": "keep"})
    'r = 0.03, rewound to fresh values and not held'
    """
    parts = [f"r = {options['rate']:g}"]
    if (options["values"], options["hold"]) != ("initial", True):
        parts.append(how_rewound(options["values"], options["hold"]))
    if options["batchnorm"] != "keep":
        parts.append(f"BatchNorm {options['batchnorm']}")
    return ", ".join(parts)


def defense_callback(defense: Defense) -> DefenseCallback:
    return DefenseCallback(defense)


def trainer_arguments(options: Any) -> dict[str, Any]:
    """The arguments of the fine-tuning's Trainer."""
    given = dict(options.trainer)
    if "max_epochs" in given:
        raise UsageError("--trainer.max_epochs: pass --max_epochs instead.")
    if options.max_epochs < 1:
        raise UsageError(f"--max_epochs must be at least 1, not {options.max_epochs}.")
    return {
        "accelerator": options.accelerator,
        "max_epochs": options.max_epochs,
        "num_sanity_val_steps": 0,
        **SILENT,
        **trainer_mapping("trainer", given),
    }


def trainer_mapping(option: str, given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a Trainer, checked; those that the command itself sets are errors."""
    ours = [name for name in _KEPT if name in given]
    if ours:
        told = " (pass --accelerator)" if "accelerator" in ours else ""
        raise UsageError(
            f"--{option}: {', '.join(ours)} cannot be set here{told}: the command trains on one device with its own "
            "callbacks. For more, write the fit with the callbacks of the package."
        )
    return checked_arguments(option, Trainer, given)


def make_trainer(arguments: dict[str, Any], callbacks: Sequence[Callback]) -> Trainer:
    """A Trainer for one device."""
    lines = [] if on_terminal() or arguments.get("enable_progress_bar") is False else [EpochLines()]
    try:
        return Trainer(devices=1, callbacks=[*callbacks, *lines], **arguments)
    except Exception as error:
        raise UsageError(f"--trainer: {one_line(error)}") from error
