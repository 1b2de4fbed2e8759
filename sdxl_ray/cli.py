"""One short function per subcommand. Heavy imports are inside, so that `sdxl-ray --help` answers at once."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="sdxl-ray",
    help="From a folder of images to an SDXL LoRA, on Ray. Every setting of CONFIG can also be given as KEY=VALUE.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ConfigFile = Annotated[Path, typer.Argument(help="TOML file of settings.", metavar="CONFIG", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Settings that replace those of the file: optimizer.learning_rate=2e-4", metavar="[KEY=VALUE]..."
    ),
]
Address = Annotated[
    str | None,
    typer.Option(help="Ray cluster, HOST:6379 or ray://HOST:10001. Else $RAY_ADDRESS, else Ray on this machine."),
]


@app.callback()
def _global(
    traceback: Annotated[bool, typer.Option("--traceback", help="Show the whole error, not only its message.")] = False,
) -> None: ...


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="File to write.")],
    preset: Annotated[str, typer.Option(help="8gb, 16gb, 24gb, 80gb or cpu: the memory of your GPU.")] = "24gb",
) -> None:
    """Write a commented file of settings to start from."""
    from sdxl_ray.config.template import PRESETS, render_template
    from sdxl_ray.errors import ConfigError

    if preset not in PRESETS:
        raise ConfigError(f'--preset "{preset}": expected one of {", ".join(PRESETS)}')
    if path.exists():
        raise ConfigError(f"{path} exists already; choose another name or remove it.")
    try:
        path.write_text(render_template(file_name=str(path), preset=preset), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from None
    typer.echo(f"{path} written. Set dataset.path in it, then: sdxl-ray check {path}")


@app.command()
def check(config: ConfigFile, overrides: Overrides = None) -> None:
    """Explain a run before it costs anything: images, buckets, steps, memory, disk."""
    from sdxl_ray.check import explain
    from sdxl_ray.config.load import load_config
    from sdxl_ray.tracking.console import Console

    with Console() as console:

        def progress(stage: str, done: int, total: int) -> None:
            if console.live or done < total:  # elsewhere only what takes long is worth a line
                console.progress(stage, done, total)

        console.line(explain(load_config(config, overrides or []), progress=progress).text())
        console.line(f"\nNext: sdxl-ray train {shlex.join([str(config), *(overrides or [])])}")


@app.command()
def doctor(
    config: Annotated[Path | None, typer.Argument(help="Also examine what this file asks for.")] = None,
    address: Address = None,
) -> None:
    """Examine this machine, the cluster and a config: what is fine, what is not, the cure."""
    from sdxl_ray.config.load import load_config
    from sdxl_ray.doctor import examine, exit_code, render

    findings = examine(address=address, config=load_config(config) if config else None)
    typer.echo(render(findings))
    raise typer.Exit(exit_code(findings))


@app.command()
def demo(
    folder: Annotated[Path, typer.Option(help="Where the demo leaves its files.")] = Path("runs/demo"),
    address: Address = None,
) -> None:
    """All three stages in a minute, without network: a tiny model, the photographs of the package, two workers."""
    from sdxl_ray.demo.run import run_demo
    from sdxl_ray.tracking.console import Console

    with Console() as console:
        run_demo(folder, console=console, address=address)


@app.command()
def cache(
    config: ConfigFile,
    overrides: Overrides = None,
    address: Address = None,
    preview: Annotated[
        Path | None, typer.Option(help="Write a contact sheet (HTML) of the crops instead; encodes nothing.")
    ] = None,
    stats: Annotated[bool, typer.Option("--stats", help="Say what the cache folder holds; change nothing.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Read everything; encode again what is damaged.")] = False,
    prune: Annotated[
        bool, typer.Option("--prune", help="Show what no dataset uses any more; with --yes delete it.")
    ] = False,
    keep_days: Annotated[
        float | None, typer.Option(help="--prune: datasets that a run has used since are kept. Else 30.", min=0)
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="--prune: delete.")] = False,
) -> None:
    """Stage 1: encode what the cache lacks. Or look after the cache."""
    from sdxl_ray.config.load import load_config
    from sdxl_ray.connection import connect
    from sdxl_ray.errors import ConfigError
    from sdxl_ray.tracking.console import Console
    from sdxl_ray.tracking.display import RunDisplay

    if sum((bool(preview), stats, verify, prune)) > 1:
        raise ConfigError("--preview, --stats, --verify and --prune: give one of them.")
    if not prune and (yes or keep_days is not None):
        raise ConfigError("--yes and --keep-days belong to --prune, which is not given.")
    settings = load_config(config, overrides or [])
    with Console() as console:
        if preview:
            from sdxl_ray.check import preview_crops

            notes = preview_crops(settings, preview, progress=console.progress)
            for note in notes:
                console.line(f"note: {note}", style="yellow")
            console.line(f"contact sheet: {preview}")
            return
        if stats or prune:
            from sdxl_ray.cache import maintenance

            if stats:
                lines = maintenance.stats(settings.cache.path).lines()
            else:
                days = 30.0 if keep_days is None else keep_days
                lines = maintenance.prune(settings.cache.path, keep_days=days, dry_run=not yes).lines(done=yes)
            for line in lines:
                console.line(line)
            return
        if verify:
            from sdxl_ray.cache.maintenance import verify as verify_shards

            damaged = verify_shards(settings.cache.path, lambda done, total: console.progress("shards", done, total))
            for name, keys in damaged.items():
                what = f"{len(keys)} entries are damaged" if keys else "cannot be used"
                console.line(f"{name}: {what}", style="yellow")
            names = ", ".join(dataset.name for dataset in settings.datasets)
            console.line(
                f"encoding again what {names} needs of it; other datasets do so when they are cached or trained on next"
                if damaged
                else "every entry is as it was written"
            )
        from sdxl_ray.cache.pipeline import build_cache

        result = build_cache(settings, progress=console.progress, connect=lambda: connect(address))
        RunDisplay(console).on_cache({"result": result})
        console.line(f"index: {result.index_path}")


@app.command()
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run from its last checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete the run of this name first.")] = False,
    address: Address = None,
) -> None:
    """Stage 2: train a LoRA; encodes what the cache lacks first."""
    from sdxl_ray.config.load import load_config
    from sdxl_ray.errors import ConfigError
    from sdxl_ray.tracking.console import Console
    from sdxl_ray.tracking.display import RunDisplay
    from sdxl_ray.train.launch import fit

    if resume and overwrite:
        raise ConfigError("--resume and --overwrite contradict each other: give one of them.")
    settings = load_config(config, overrides or [])
    run_folder = Path(settings.run.output) / settings.run.name
    with Console() as console:
        display = RunDisplay(console)
        result = fit(
            settings,
            resume=resume,
            overwrite=overwrite,
            address=address,
            on_event=display,
            on_folder=lambda: console.log_to(run_folder / "log.txt"),
        )
        console.line()
        for file in result.exports:
            console.line(f"LoRA: {file}")
        console.line(f'Next: sdxl-ray generate {result.run_folder} -p "..."')


@app.command()
def sweep(
    config: ConfigFile,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted sweep.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete the sweep of this name first.")] = False,
    address: Address = None,
) -> None:
    """Stage 3: search the settings named in [sweep], stop bad trials early, export the best LoRA."""
    from sdxl_ray.config.load import load_config
    from sdxl_ray.sweeps.tuner import sweep as run_sweep
    from sdxl_ray.tracking.console import Console
    from sdxl_ray.tracking.display import RunDisplay

    settings = load_config(config, overrides or [])
    with Console() as console:
        result = run_sweep(settings, resume=resume, overwrite=overwrite, address=address, on_event=RunDisplay(console))
        console.line()
        console.line(result.table())
        console.line()
        console.line(f"best settings: {result.best_config_path}")
        for file in result.exports:
            console.line(f"best LoRA: {file}")
        console.line(f"Next: sdxl-ray train {result.best_config_path}")


@app.command()
def generate(
    source: Annotated[Path, typer.Argument(help="A run's folder, a checkpoint or a LoRA file.")],
    prompt: Annotated[list[str], typer.Option("--prompt", "-p", help="What to draw; may be given several times.")],
    out: Annotated[Path, typer.Option(help="Folder for the images.")] = Path("images"),
    step: Annotated[int | None, typer.Option(help="Of the checkpoint. Else the exported LoRA.")] = None,
    model: Annotated[str, typer.Option(help="Base model. Else the run's, or SDXL base for a LoRA file.")] = "",
    negative_prompt: Annotated[str, typer.Option(help="What to steer away from.")] = "",
    height: Annotated[int | None, typer.Option(help="Pixels. Else as in the run's validation.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels. Else as in the run's validation.")] = None,
    num_steps: Annotated[int, typer.Option(help="Sampler steps.")] = 25,
    guidance_scale: Annotated[float, typer.Option(help="1: off.")] = 5.0,
    seed: Annotated[int, typer.Option(help="First noise; the second prompt uses the next number.")] = 0,
    lora_scale: Annotated[float, typer.Option(help="Strength of the LoRA.")] = 1.0,
    compare: Annotated[bool, typer.Option("--compare", help="Also draw without the LoRA, side by side.")] = False,
) -> None:
    """Draw images with a run, a checkpoint or a LoRA file."""
    from sdxl_ray.errors import ConfigError
    from sdxl_ray.generate import generate_images

    if (height is None) != (width is None):
        raise ConfigError("--height and --width: give both or none.")
    paths = generate_images(
        source,
        prompt,
        out=out,
        step=step,
        model=model,
        negative_prompt=negative_prompt,
        height_width=(height, width) if height and width else None,
        num_steps=num_steps,
        guidance_scale=guidance_scale,
        seed=seed,
        lora_scale=lora_scale,
        compare=compare,
    )
    for path in paths:
        typer.echo(path)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run's folder or one of its checkpoints.")],
    step: Annotated[int | None, typer.Option(help="Of the checkpoint. Else the last.")] = None,
    formats: Annotated[
        list[str] | None,
        typer.Option("--format", help="kohya, diffusers, kohya-svd, checkpoint, diffusers-folder; may be repeated."),
    ] = None,
) -> None:
    """Write and verify the LoRA files of a checkpoint."""
    from sdxl_ray.train.launch import export_lora

    for file in export_lora(run, step=step, formats=formats or ()):
        typer.echo(str(file))
