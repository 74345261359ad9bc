"""What two runs of one configuration differ in, but for what the clock says: see nothing_lost.py."""

import json

import jax
import numpy as np
import orbax.checkpoint as ocp
from tiny import contents, rows


def differences(ours, theirs, trained):
    found = []
    if rows(ours) != rows(theirs):
        found.append("metrics.jsonl")
    for stage in trained:
        if (ours / stage / "done.json").read_bytes() != (theirs / stage / "done.json").read_bytes():
            found.append(f"{stage}/done.json")
        for step in sorted(path.name for path in (theirs / stage / "checkpoints").iterdir() if path.name.isdigit()):
            own = ours / stage / "checkpoints" / step
            if not own.is_dir() or not _equal(own, theirs / stage / "checkpoints" / step):
                found.append(f"{stage}/checkpoints/{step}")
    left, right = (_evaluation(run / "eval") for run in (ours, theirs))
    return found + [f"eval/{name}" for name in sorted({*left, *right}) if left.get(name) != right.get(name)]


def _equal(ours, theirs):
    left, right = arrays(ours), arrays(theirs)
    same = left.keys() == right.keys() and all(np.array_equal(left[name], right[name]) for name in left)
    return same and _beside(ours) == _beside(theirs)


def arrays(checkpoint):
    """Name -> array of a checkpoint's state."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        tree = reader.metadata(checkpoint / "state").item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        state = reader.restore(checkpoint / "state", args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    return ocp.tree.to_flat_dict(state, sep=".")


def _beside(checkpoint):
    saved = json.loads((checkpoint / "meta" / "metadata").read_text())
    return saved["metric"], saved["meta"]["data"], saved["meta"]["unlogged"]


def _evaluation(folder):
    """Without report.html, which shows how fast the training was."""
    found = {name: content for name, content in contents(folder).items() if not name.endswith("report.html")}
    for name in found:
        if name.endswith("manifest.json"):
            found[name] = json.loads(found[name]) | {"git": ""}
    return found
