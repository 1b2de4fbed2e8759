"""This machine, this cluster, this config: what is fine, what is worth knowing, what is a problem, and the cure.

    python ─▶ packages ─▶ accelerators ─▶ ray ─▶ disk, memory, files ─▶ hub ─▶ the config's model, dataset, folders

    machine    Python, packages, accelerators, memory, files
    cluster    Ray
    inputs     what a run reads and writes

Each examination is a function that returns findings. One that fails is a finding itself: `examine` never raises, and it
never prints a secret, only whether there is one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from sdxl_ray.doctor import cluster, inputs, machine
from sdxl_ray.doctor.finding import Finding

if TYPE_CHECKING:
    from sdxl_ray.config.schema import Config

__all__ = ["Finding", "examine", "exit_code", "render"]


def examine(*, address: str | None = None, config: Config | None = None) -> list[Finding]:
    """Look at everything. Starts no Ray; connects to one only where `address` or $RAY_ADDRESS names it."""
    examinations: list[tuple[str, Callable[[], list[Finding]]]] = [
        ("python", machine.python_version),
        ("packages", machine.packages),
        ("accelerator", machine.accelerators),
        ("ray", cluster.stale_cluster_note),  # before connecting, which removes it
        ("ray", lambda: cluster.ray_cluster(address, config)),
        ("ray auth", cluster.ray_authentication),
        ("disk", lambda: inputs.disk_space(config)),
        ("shared memory", machine.shared_memory),
        ("open files", machine.open_files),
        ("hub", inputs.hub),
    ]
    if config is not None:
        examinations += [
            ("model", lambda: inputs.base_model(config)),
            ("dataset", lambda: inputs.dataset(config)),
            ("output", lambda: inputs.output_folders(config)),
            ("wandb", lambda: inputs.wandb_login(config)),
        ]
    return [finding for subject, examination in examinations for finding in _guarded(subject, examination)]


def exit_code(findings: Sequence[Finding]) -> int:
    """1 if anything is a problem, else 0."""
    return int(any(finding.state == "problem" for finding in findings))


def render(findings: Sequence[Finding]) -> str:
    """Aligned plain text; a cure stands on the line below its finding."""
    width = max((len(finding.subject) for finding in findings), default=0)
    lines = []
    for finding in findings:
        indent = " " * (width + 11)
        lines.append(f"{finding.state:<7}  {finding.subject:<{width}}  " + finding.found.replace("\n", f"\n{indent}"))
        if finding.cure:
            lines.append(f"{indent}-> " + finding.cure.replace("\n", f"\n{indent}   "))
    return "\n".join(lines)


def _guarded(subject: str, examination: Callable[[], list[Finding]]) -> list[Finding]:
    try:
        return examination()
    except Exception as error:  # whatever it is, the other examinations go on
        return [Finding(subject, "problem", f"could not be examined: {type(error).__name__}: {error}")]
