"""A run's events as lines that a person reads."""

from __future__ import annotations

from typing import Any

from sdxl_ray.tracking.console import Console
from sdxl_ray.tracking.metrics import duration, progress_line


class RunDisplay:
    """Called with each event of `fit` and `build_cache`."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.memory_total_gib = 0.0
        self.first_eval: float | None = None
        self.resumed_at = 0

    def __call__(self, event: dict[str, Any]) -> None:
        getattr(self, f"on_{event['event']}")(event)

    def on_progress(self, event: dict[str, Any]) -> None:
        self.console.progress(event["stage"], event["done"], event["total"])

    def on_cache(self, event: dict[str, Any]) -> None:
        result = event["result"]
        buckets = ", ".join(f"{bucket} {count}" for bucket, count in sorted(result.buckets.items()))
        self.console.line(f"cache: {result.num_samples} samples ({buckets})")
        if result.num_latents_encoded or result.num_captions_encoded:
            self.console.line(
                f"       encoded {result.num_latents_encoded} images and {result.num_captions_encoded} captions "
                f"in {duration(result.seconds)}{_speed(result)}"
            )
            stages = ", ".join(f"{name} {duration(seconds)}" for name, seconds in result.stage_seconds.items())
            worked = ", ".join(f"{name} {duration(seconds)}" for name, seconds in sorted(result.worker_seconds.items()))
            self.console.line(f"       stages: {stages}; work of all tasks together: {worked}")
        elif result.background is not None:
            self.console.line("       what is missing is encoded while training")
        elif not result.num_tried:
            self.console.line("       nothing to encode: all of it was there")
        elif not result.num_there:
            self.console.line("       nothing was encoded: what was missing cannot be used")
        if result.num_there:
            self.console.line(f"       {result.num_there} entries were encoded by another job at the same time")
        if result.skipped:
            self.console.line(
                f"       skipped {len(result.skipped)} images, reasons in {result.skipped_path}", style="yellow"
            )
        for note in result.notes:
            self.console.line(f"       {note}", style="yellow")
        if result.num_tiled:
            self.console.line(
                f"       {result.num_tiled} images were encoded in tiles, for want of memory: a little less exact "
                "(cache.gpus_per_encoder = 1, or a smaller dataset.resolution)",
                style="yellow",
            )
        if result.num_long_captions:
            self.console.line(
                f"       {result.num_long_captions} captions are longer than {result.max_tokens} tokens; the rest of "
                "them is not seen (cache.caption_chunks)",
                style="yellow",
            )

    def on_started(self, event: dict[str, Any]) -> None:
        self.memory_total_gib = event["memory_total_gib"]
        self.resumed_at = event["step"]
        held_out = f"{event['num_held_out']} for the eval loss" if event["num_held_out"] else "no eval loss"
        samples = f"{event['num_train']} samples to train on, {held_out}"
        if event["checkpoint"]:
            self.console.line(
                f"train: continuing at step {event['step']} of {event['max_steps']}, {event['checkpoint']}; {samples}"
            )
        else:
            self.console.line(f"train: {event['max_steps']} steps; {samples}")
        if event["num_left_out"]:
            self.console.line(
                f"       {event['num_left_out']} images are evaluated, so their copies are not trained on",
                style="yellow",
            )

    def on_metrics(self, event: dict[str, Any]) -> None:
        step, max_steps, values = event["step"], event["max_steps"], event["values"]
        if "train/loss" in values:
            text = progress_line(step, max_steps, values, memory_total_gib=self.memory_total_gib)
            self.console.line(text)
            if self.console.live and step < max_steps:
                self.console.progress("steps", step, max_steps)
        if "eval/loss" in values:
            loss = values["eval/loss"]
            if self.first_eval is None:
                since = "" if step else " (before training)"
                self.first_eval = loss
            else:
                first = f"the first after step {self.resumed_at}" if self.resumed_at else "the first"
                since = f" ({loss - self.first_eval:+.4f} since {first})"
            self.console.line(f"eval  {step:>{len(str(max_steps))}}/{max_steps} | eval loss {loss:.4f}{since}")

    def on_images(self, event: dict[str, Any]) -> None:
        self.console.line(f"images: {event['count']} in {event['folder']}")

    def on_checkpoint(self, event: dict[str, Any]) -> None:
        self.console.line(f"saved: checkpoint of step {event['step']}")

    def on_line(self, event: dict[str, Any]) -> None:
        self.console.line(event["text"])


def _speed(result: Any) -> str:
    seconds = result.stage_seconds.get("images", 0.0)
    if not seconds or not result.num_latents_encoded:
        return ""
    return f", {result.num_latents_encoded / seconds:.1f} images/s, the encoders' start included"
