"""``probekit pretrain`` and ``probekit finetune``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from probekit_train.recipe import Training

Recipe = Annotated[str | None, typer.Option(help="A recipe of the pack or a YAML file.")]
Setting = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Another value for a field of the recipe."),
]
DatasetName = Annotated[str | None, typer.Option("--dataset", "-d", help="NAME:ARGUMENT, e.g. folder:PATH.")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="The training's folder.")]
Seed = Annotated[int | None, typer.Option(help="Of weights, order, views and masks.")]
Local = Annotated[int | None, typer.Option(metavar="K", help="Attend only to the K x K patches around.")]
StopAfter = Annotated[
    float | None, typer.Option(metavar="MINUTES", help="Do this much now; the same command does the rest.")
]
SaveEvery = Annotated[float, typer.Option(metavar="MINUTES", help="Between checkpoints.")]
Half = Annotated[bool, typer.Option("--half", help="Also write the checkpoint in float16.")]
Workers = Annotated[int, typer.Option(help="Processes that prepare images.", min=0)]
Cpu = Annotated[bool, typer.Option("--cpu", help="Leave accelerators alone.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print what the checkpoint says of itself as JSON.")]


def pretrain(
    recipe: Recipe = None,
    objective: Annotated[
        str | None, typer.Option(help="moco, simmim, mae, hybrid or supervised: its miniature recipe.")
    ] = None,
    dataset: DatasetName = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="A ViT's name in timm.")] = None,
    weight: Annotated[
        float | None, typer.Option("--lambda", help="Of the contrastive loss in a hybrid.")
    ] = None,
    setting: Setting = None,
    local_attention: Local = None,
    seed: Seed = None,
    out: Out = None,
    stop_after: StopAfter = None,
    save_every: SaveEvery = 5.0,
    half: Half = False,
    workers: Workers = 0,
    cpu: Cpu = False,
    as_json: AsJson = False,
) -> None:
    """Train a ViT without labels (MoCo v3, SimMIM, MAE, both at once) or with; the same command resumes.

    \b
    Examples:
      probekit pretrain --recipe miniature-simmim --out runs/simmim
      probekit pretrain --objective hybrid --lambda 0.2 --dataset folder:photos --set epochs=50
      probekit pretrain --recipe miniature-moco --model vit_tiny_patch16_224 --set img_size=224
      probekit run --model trained@runs/simmim/model.safetensors --metrics all --dataset folder:photos

    On several GPUs or machines: accelerate launch -m probekit pretrain ...
    """
    from probekit.errors import UsageError
    from probekit.names import quoted
    from probekit_train.pretraining import pretraining
    from probekit_train.reading import changed, make, read

    if recipe is None and objective is None:
        raise UsageError(
            "neither a recipe nor an objective is given",
            hint="`--recipe miniature-simmim`, or `--objective moco`",
        )
    if recipe is None:
        _check_objective(objective)
    fields = read(recipe or f"miniature-{objective}")
    if objective is not None and fields.get("objective") != objective:
        raise UsageError(
            f"recipe {quoted(recipe)} is for {quoted(fields.get('objective'))}, not for {quoted(objective)}",
            hint="leave one of them out",
        )
    if model is not None and model != fields.get("model"):
        fields = {**fields, "model": model, "model_args": {}}
    given = {"dataset": dataset, "lambda": weight, "local_attention": local_attention, "seed": seed}
    fields = {**fields, **{key: value for key, value in given.items() if value is not None}}
    made = make(changed(fields, setting or ()))
    if made.objective == "finetune":
        raise UsageError(f"recipe {quoted(recipe)} is for fine-tuning", hint="`probekit finetune`")
    folder = out or Path("runs") / Path(recipe or f"miniature-{objective}").stem
    _run(made, folder, pretraining, stop_after, save_every, half, workers, cpu, as_json)


def _check_objective(objective: str | None) -> None:
    from probekit_train.pretraining import OBJECTIVES
    from probekit_train.reading import make

    if objective not in (*OBJECTIVES, "supervised"):
        make({"objective": objective if objective != "finetune" else "fine-tuning"})


def _run(
    recipe: Training,
    folder: Path,
    plan: Any,
    stop_after: float | None,
    save_every: float,
    half: bool,
    workers: int,
    cpu: bool,
    as_json: bool,
) -> None:
    """What both commands do with a recipe."""
    from probekit.cli import state as cli
    from probekit.cli.plain import print_json, tame
    from probekit.store.sealing import seal_json
    from probekit.subject import open_dataset
    from probekit_train.pretraining import MODEL, length, run, summary
    from probekit_train.showing import shown, write_log
    from probekit_train.training import processes

    catalog = cli.catalog()
    dataset = open_dataset(catalog.dataset(recipe.dataset), catalog)
    accelerator = processes(recipe, cpu)
    main = accelerator.is_main_process
    with shown(as_json or not main) as listen:
        listen.say(f"  {recipe.objective} on {recipe.dataset}, {length(recipe)}: {tame(folder)}")
        state, said = run(
            recipe, dataset, folder, accelerator, plan, workers=workers, stop_after=stop_after,
            save_every=save_every, half=half, decoding=listen.decoding, listen=listen,
        )  # fmt: skip
    if not main:
        return
    write_log(folder, state.rows)
    seal_json(folder / "card.json", said)
    if as_json:
        print_json({"checkpoint": str(folder / MODEL), **said})
        return
    typer.echo(f"  {summary(said)}")
    if "not_held_out" in said:
        typer.echo(f"  nothing said of held-out images: {tame(said['not_held_out'])}")
    typer.echo(
        f"  {tame(folder / MODEL)}" if said["finished"] else "  not finished: the same command goes on"
    )


def finetune(
    model: Annotated[str, typer.Option("--model", "-m", help="NAME[:VARIANT][@WEIGHTS].")],
    recipe: Annotated[str, typer.Option(help="A recipe of the pack or a YAML file.")] = "park2023-finetune",
    dataset: DatasetName = None,
    setting: Setting = None,
    reinit_first: Annotated[int, typer.Option(metavar="K", help="First blocks that begin anew.", min=0)] = 0,
    reinit_last: Annotated[int, typer.Option(metavar="K", help="Last blocks that begin anew.", min=0)] = 0,
    local_attention: Local = None,
    seed: Seed = None,
    out: Out = None,
    stop_after: StopAfter = None,
    save_every: SaveEvery = 5.0,
    half: Half = False,
    workers: Workers = 0,
    cpu: Cpu = False,
    as_json: AsJson = False,
) -> None:
    """Train a model's classifier on a dataset's labels, with the model or without; the same command resumes.

    \b
    Examples:
      probekit finetune --model simmim:vit-b16@simmim.pth --dataset folder:/data/imagenet/train
      probekit finetune --model moco:vit-b16 --recipe park2023-linear --dataset folder:photos
      probekit finetune --model trained@model.safetensors --recipe miniature-finetune --reinit-last 4
    """
    from functools import partial

    from probekit.cli import state as cli
    from probekit.errors import UsageError
    from probekit.names import quoted
    from probekit_train.finetuning import finetuning
    from probekit_train.reading import changed, make, read

    fields = read(recipe)
    if fields.get("objective") != "finetune":
        raise UsageError(f"recipe {quoted(recipe)} is for pre-training", hint="`probekit pretrain`")
    given = {
        "model": model,
        "dataset": dataset,
        "reinit_first": reinit_first or None,
        "reinit_last": reinit_last or None,
        "local_attention": local_attention,
        "seed": seed,
    }
    fields = {**fields, **{key: value for key, value in given.items() if value is not None}}
    made = make(changed(fields, setting or ()))
    plan = partial(finetuning, catalog=cli.catalog())
    folder = out or Path("runs") / Path(recipe).stem
    _run(made, folder, plan, stop_after, save_every, half, workers, cpu, as_json)


def _app(name: str, command: Callable[..., None]) -> typer.Typer:
    """The command as an app, for its help to look like that of probekit's own commands."""
    app = typer.Typer(
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.command(name)(command)
    return app


pretrain_app = _app("pretrain", pretrain)
finetune_app = _app("finetune", finetune)
