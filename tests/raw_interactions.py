"""A few users' interactions as files, for the tests of the builder that reads them."""

from fgrpo_jax.config import DataConfig, InteractionsConfig
from fgrpo_jax.data import datasets

ITEMS = 30


def walk(user, length=8):
    """What a user takes, in order: distinct items."""
    return [(7 * user + 3 * n) % ITEMS for n in range(length)]


def csv_file(path, names, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([names, *rows]) + "\n", encoding="utf-8")


def logs(folder, users=6, length=8, time=lambda user, n: 1000 * n + user, order=None):
    """interactions.csv and items.csv; order: of the rows, by (user, n, item)."""
    rows = [(u, n, i) for u in range(users) for n, i in enumerate(walk(u, length))]
    rows = sorted(rows, key=order) if order else rows
    csv_file(folder / "interactions.csv", "user,item,time,stars", [
        f"u{u},{i},{time(u, n)},{1 + i % 5}" for u, n, i in rows
    ])  # fmt: skip
    csv_file(folder / "items.csv", "id,text,genre", [f'{i},"Item, the {i}th",G{i % 3}' for i in range(ITEMS)])


def load(folder, prepared=None, pool_size=6, pool="open", **fields):
    config = InteractionsConfig(**fields)
    place = {"manual_dir": str(folder), "prepared_dir": str(prepared or folder / "prepared")}
    return datasets.load(DataConfig(name="interactions", pool_size=pool_size, pool=pool, interactions=config, **place))


def ids(items):
    return [item for item, _ in items]


def relevant(example):
    return {item: gain for (item, _), gain in zip(example.candidates, example.relevance) if gain}


def lists(folder, rows):
    csv_file(folder / "candidates.csv", "split,user,item,score", rows)


def own_lists(users=6, length=8, size=9, skip=()):
    """Of every user and split: items in order of their number, from the user's own first."""
    return [
        f"{split},u{user},{(user + n) % ITEMS},{size - n}"
        for split in ("train", "validation", "test")
        for user in range(users)
        for n in range(size)
        if (split, user) not in skip
    ]
