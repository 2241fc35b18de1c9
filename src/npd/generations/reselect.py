"""Another selection for a finished generation, from its columns alone."""

from __future__ import annotations

from dataclasses import replace

import pyarrow as pa

from npd.config import Config, config_tree, differing_keys
from npd.errors import UserError
from npd.generations.generation import Generation
from npd.observe.console import show_generation
from npd.observe.display import Display
from npd.records import GenerationEnd, StepLine
from npd.selection import Select, Summary, check_some_kept, has_free
from npd.store import Store, check_places, record, recorded

JUDGED = ["ifd_student", "ifd_teacher", "delta_ifd", "verdict"]


def reselect(config: Config, store: Store, generation: int, display: Display) -> Generation:
    """Write new verdicts into the parts of a generation that is not trained on yet, and the selection into config.yaml.

    Raises:
        UserError: training on it has begun, its parts are gone, or more than the selection differs.
        RunError: the selection keeps nothing; nothing was changed then.
    """
    check_places(store.path)
    store.joined = True
    old = recorded(store.path)
    others = differing_keys(old.tree, config_tree(config) | {"selection": old.tree.get("selection")})
    if others:
        raise UserError(f"--reselect changes selection.* alone, but {store.path} differs in " + "; ".join(others) + ".")
    lines = store.read_metrics()
    begun = [line.step for line in lines if isinstance(line, StepLine | GenerationEnd) and line.generation == generation]
    if begun:
        raise UserError(
            f"Generation {generation} of {store.path} is trained on since step {begun[0]}; other verdicts would not be those "
            "of that training. Copy the directory without metrics.jsonl, checkpoints and student, and select there."
        )
    if store.parts(generation + 1):
        raise UserError(
            f"Generation {generation + 1} of {store.path} is being made with the old selection; finish it with `npd refresh` "
            "first."
        )
    manifest = store.manifest(generation)
    assert manifest is not None, "only a finished generation is judged anew"
    parts = range(len(manifest.parts))
    if missing := store.missing_parts(generation, len(parts)):
        raise UserError(
            f"Generation {generation} of {store.path} lacks {len(missing)} of its {len(parts)} parts.",
            "Make them again with `npd refresh` first.",
        )
    select, summary = Select(config.selection), Summary(config.selection)

    def judged(part: int) -> pa.Table:
        table = store.read_part(generation, part, check=True).drop_columns(JUDGED)
        if select.rule.reads_free and not has_free(table):
            raise UserError(
                f"selection.rule {config.selection.rule} judges by what student and teacher make of a response without its "
                f"prompt, but generation {generation} of {store.path} was made by a rule that does not, so neither was asked "
                "(the columns *_nll_free are null).",
                "Choose a rule that does not read them, or make the generation anew with this rule, or with scoring.free: "
                "always.",
            )
        if config.selection.reward != "any" and "reward" not in table.column_names:
            raise UserError(
                f"selection.reward {config.selection.reward} judges by the column reward, which generation {generation} of "
                f"{store.path} does not have: no row of its prompts has an answer, or scoring.verify was false.",
                "Choose selection.reward any, or make the generation anew.",
            )
        return select(table)

    for part in parts:
        summary.add(judged(part))
    result = summary.result()
    check_some_kept(result, config.selection)
    # Until the new manifest is there, parts are what the old one calls damaged: after a crash, they are made again by
    # whichever selection config.yaml has then, or judged again by the same command.
    for part in parts:
        store.write_part(generation, part, judged(part), keep_manifest=True)
    record(store.path, config_tree(config), old.provenance)
    manifest = replace(manifest, parts=store.part_entries(generation, len(parts)), selection=result)
    store.finish_generation(manifest)
    show_generation(manifest, display)
    return Generation(generation, store.generation(generation), manifest.policy_version, manifest.to_json())
