"""How `--help` looks: commands and options in groups, a plain list that breaks no word at 80 columns."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

_FEW = 14  # options of a command that need no groups
_OTHERS = "Options"
_GROUPS = {  # title -> parameters, in the order of the help
    "Which bits": "preset scheme bits target_size candidates rule embeddings layers plot",
    "Text": "data samples sequence_length shuffle bos windows seed statistics",
    "Comparison and tasks": "against tasks task_data limit shots record family title",
    "Method": "solver beam_size relative_mse_tolerance gaussian_reference set_",
    "Fine-tuning of blocks": ("finetune_epochs finetune_batch_size finetune_learning_rate finetune_search tune"),
    "Tuning": (
        "steps learning_rate held_out evaluation_interval patience pv pv_learning_rate pv_fraction pv_trust_ratio "
        "pv_states"
    ),
    "Server": "host port name batching batch_tokens",
    "Machine": (
        "threads device dtype memory_limit device_memory_limit batch_size micro_batch_size gradient_checkpointing "
        "cache_teacher work_dir workers index of"
    ),
    "Output": "out config overwrite dry_run json verbose quiet help",
}
_GROUP_OF = {name: title for title, names in _GROUPS.items() for name in names.split()}
_HYPHEN = "\N{NON-BREAKING HYPHEN}"
_WIDEST = 28  # columns of names beside their help; longer ones stand above it


def _whole(text: str | None) -> str | None:
    """Text whose words are not broken at their hyphens, which are others until it is written."""
    return text and text.replace("-", _HYPHEN)


def _format_help(command: Any, ctx: Any, formatter: Any, base: Any) -> None:
    kept = command.help, command.epilog
    command.help, command.epilog = map(_whole, kept)
    try:
        base(ctx, formatter)
    finally:
        command.help, command.epilog = kept
    formatter.buffer[:] = [text.replace(_HYPHEN, "-") for text in formatter.buffer]


def _write(formatter: Any, title: str, rows: Iterable[tuple[str, str]]) -> None:
    rows = [(first, str(_whole(second)).replace("\\[", "[")) for first, second in rows]
    if rows:
        with formatter.section(title):
            formatter.write_dl(rows, col_max=_WIDEST)


class _Command(TyperCommand):
    def format_help(self, ctx: Any, formatter: Any) -> None:
        _format_help(self, ctx, formatter, super(TyperCommand, self).format_help)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        records = [(parameter, parameter.get_help_record(ctx)) for parameter in self.get_params(ctx)]
        shown = [(parameter, record) for parameter, record in records if record is not None]
        _write(formatter, "Arguments", [record for one, record in shown if one.param_type_name == "argument"])
        options = [(one.name, record) for one, record in shown if one.param_type_name != "argument"]
        groups: dict[str, list[tuple[str, str]]] = {title: [] for title in (*_GROUPS, _OTHERS)}
        for name, record in options:
            groups[_GROUP_OF.get(str(name), _OTHERS) if len(options) > _FEW else _OTHERS].append(record)
        for title, rows in groups.items():
            _write(formatter, title, rows)


class _Group(TyperGroup):
    def format_help(self, ctx: Any, formatter: Any) -> None:
        _format_help(self, ctx, formatter, super(TyperGroup, self).format_help)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for name in self.list_commands(ctx):
            command: Any = self.get_command(ctx, name)
            text = command.get_short_help_str(500).partition("\n")[0]
            groups.setdefault(command.rich_help_panel or "Commands", []).append((name, text))
        for title, rows in groups.items():
            _write(formatter, title, rows)


class App(typer.Typer):
    """An application whose help looks so; the groups of its commands are their `rich_help_panel`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(cls=_Group, **options)

    def command(self, name: str | None = None, **options: Any) -> Any:
        return super().command(name, cls=_Command, **options)
