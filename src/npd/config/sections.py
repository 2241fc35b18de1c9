"""One tree of options: every option, its default, its reason.

Defaults marked (paper) are those of arXiv:2605.05940 as METHOD reports them; all others are ours.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from npd.config.base import (
    LONGEST_TEXT,
    MANY,
    VLLM_FREE,
    DivergenceName,
    EngineName,
    MirrorURI,
    Place,
    RuleName,
    Sampling,
    Section,
    Temperature,
)
from npd.config.harness import HarnessConfig
from npd.config.models import StudentConfig, TeacherConfig
from npd.config.ray import RayConfig
from npd.registry import DIVERGENCES, ENGINES, RULES

MOST_PROMPTS = 100 * MANY
DataColumn = Literal["prompt", "completion", "messages", "answer", "source", "tools", "teacher_prompt", "reasoning_gym"]


class DataConfig(Section):
    train: Place
    """Prompts: a .jsonl, .json, .parquet or .csv file (also .gz or .zst), a directory of them or of a saved dataset, or a
    Hub dataset."""
    eval: Place | None = None
    """Held-out prompts, for the KL to the teacher and for `answer` accuracy."""
    split: str = "train"
    """Split to read when `train` or `eval` is a dataset, also a slice of it: train[:10%]. Of a file, rows: train[:1000]."""
    eval_split: str | None = None
    """Split of `eval`; null: as split."""
    config: str | None = None
    """Configuration of a Hub dataset that has several."""
    columns: dict[DataColumn, str] = {}
    """The data's own names, such as {prompt: question, answer: solution}: for prompt, completion, messages, answer, source,
    tools, teacher_prompt and reasoning_gym."""
    template_options: dict[str, Any] = {}
    """Variables for the chat template, such as {enable_thinking: false}: in training, references and evaluation alike."""
    max_prompt_tokens: int = Field(default=1024, ge=1, le=LONGEST_TEXT)
    """Longer prompts are left out, counted and named; none is cut."""
    references: Literal["given", "teacher"] = "given"
    """Reference responses, for `npd sft` and schedule.references: the data's own completions, or the teacher's answers
    (sequence-level KD)."""


class ScheduleConfig(Section):
    generations: int = Field(default=2, ge=1, le=MANY)
    """How often the student writes a new set of responses. 2 is the paper's single student update inside a cycle."""
    prompts: Literal["all"] | int = "all"
    """Prompts a generation answers: all (paper), or a number, taken in turn from a shuffled list. Strict on-policy
    distillation is one batch of prompts and passes 1."""
    passes: int = Field(default=5, ge=1, le=MANY)
    """Passes over one generation's responses. 2 generations x 5 are the paper's K = 10 epochs (paper)."""
    kl_budget: float | None = Field(default=None, gt=0, allow_inf_nan=True)
    """End a generation as soon as its smoothed near-policy KL passes this many nats per token; `passes` is then the most
    it may last. The paper bounds the KL by about 0.10. Set training.max_steps with it: the learning rate then follows the
    steps; otherwise it jumps where a generation ends early."""
    lead: float = Field(default=1.0, ge=0, le=MANY)
    """Passes before the end of a generation at which the next snapshot is taken; the next generation is then made in the
    background. 0: take turns, with every response from the newest weights. At most `passes`."""
    references: float = Field(default=0.0, ge=0, le=0.99)
    """Share of each pass's response tokens that come from reference responses (data.references says whose), read by the
    teacher and trained with the same loss (paper: 0)."""

    @field_validator("prompts")
    @classmethod
    def _positive(cls, value: str | int) -> str | int:
        if isinstance(value, int) and not 1 <= value <= MOST_PROMPTS:
            raise ValueError(f"must be 'all', or from 1 to {MOST_PROMPTS:,}")
        return value

    @model_validator(mode="after")
    def _within(self) -> ScheduleConfig:
        if self.lead > self.passes:
            raise ValueError(
                f"lead ({self.lead:g}) is above passes ({self.passes}): a snapshot can't be taken before its generation's "
                "predecessor is begun"
            )
        return self


class RolloutConfig(Section):
    engine: EngineName = ENGINES.default
    """What decodes: transformers, or vLLM (pip install 'npd[vllm]'), which is many times faster on a GPU."""
    vllm: dict[str, Any] = Field(default={}, json_schema_extra={"free": [*VLLM_FREE]})
    """Options of the vLLM engine by vLLM's own names, such as {gpu_memory_utilization: 0.6, tensor_parallel_size: 2}."""
    options: dict[str, Any] = {}
    """Options of any other engine, by its own names."""
    samples_per_prompt: int = Field(default=1, ge=1, le=65536)
    """Responses per prompt and generation."""
    max_new_tokens: int = Field(default=1024, ge=1, le=LONGEST_TEXT)
    """A response that has not stopped by then is kept with finish_reason "length"."""
    temperature: Temperature = 1.0
    """Sampling temperature; 0 decodes greedily. The near-policy KL is exact in expectation only at 1."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus sampling; 1 switches it off. Below 1 the near-policy KL is a proxy."""
    batch_size: int = Field(default=64, ge=1, le=65536)
    """Sequences decoded at once (vllm: max_num_seqs, unless rollout.vllm says otherwise)."""
    batching: Literal["auto", "continuous", "static"] = Field(default="auto", json_schema_extra={"before": "static"})
    """How the engine transformers fills its batch: continuous gives the place of a response that has ended to the next
    prompt at once; static is generate(), which waits for the longest of a batch. auto is continuous where that is proved,
    when the model is first written with, to compute what reading each sequence alone does."""
    part_size: int = Field(default=1024, ge=1, le=MANY)
    """Prompts a part file holds: what a crash can lose, at most."""
    check_samples: int = Field(default=8, ge=0, le=65536)
    """Short responses by which an engine other than transformers is compared with it before it answers; 0 compares none."""
    check_bound: float = Field(default=0.05, gt=0, le=1e6)
    """Mean absolute difference in nats per token above which that check warns. Other kernels and bfloat16 make some 0.01;
    weights of another snapshot make far more."""

    @model_validator(mode="after")
    def _within_the_engine(self) -> RolloutConfig:
        for name in ENGINES:
            if name != self.engine and isinstance(options := getattr(self, name, None), dict) and options:
                raise ValueError(f"{name} has options ({', '.join(options)}), but engine is {self.engine}")
        return self

    @property
    def engine_options(self) -> dict[str, Any]:
        """The options of the engine that is chosen."""
        named = getattr(self, self.engine, None)
        return self.options | (named if isinstance(named, dict) else {})


class ScoringConfig(Section):
    top_k: int = Field(default=10, ge=1, le=MANY)
    """Teacher log-probabilities kept per response token (paper: 10, best of its sweep)."""
    batch_tokens: int = Field(default=8192, ge=1, le=1 << 31)
    """Tokens in one packed prefill batch."""
    free: Literal["needed", "always"] = Field(default="needed", json_schema_extra={"before": "always"})
    """When responses are read a second time, without their prompts, by student and teacher, as IFD wants it. needed: where
    selection.rule judges by it; the columns *_nll_free, ifd_* and delta_ifd are null otherwise. always: so that a generation
    can be judged by another rule later (`npd refresh --reselect`)."""
    verify: bool = Field(default=True, json_schema_extra={"before": False})
    """Let the verifiers of evaluation judge every response to a row with an `answer` or a reasoning_gym entry (column
    reward): for selection.reward, and for the share of right ones in the report."""


class SelectionConfig(Section):
    rule: RuleName = RULES.default
    """delta_ifd keeps lower <= delta <= upper (paper); adaptive lets both bounds follow the data, per source where there
    are 200 samples of it; none keeps everything."""
    ifd: Literal["loss_ratio", "perplexity_ratio"] = "loss_ratio"
    """IFD as a ratio of mean NLLs, or of perplexities (Superfiltering); the paper does not settle which."""
    lower: float = Field(default=0.0, allow_inf_nan=True)
    """Below it a response is "degenerate" (paper: 0)."""
    upper: float = Field(default=0.8, allow_inf_nan=True)
    """Above it a response is "disconnect" (paper: 0.8, best of its sweep). The adaptive rule never goes above it."""
    adaptive_lower: float = Field(default=-0.4, allow_inf_nan=True)
    """The adaptive rule never goes below it."""
    reward: Literal["any", "correct", "contrast"] = "any"
    """What a response that the rule keeps must be beside: correct, right by its row's verifier; contrast, one of a prompt
    that has right and wrong ones (rollout.samples_per_prompt of at least 2)."""
    options: dict[str, Any] = {}
    """Options of a rule that a plug-in brings, by its own names."""

    @model_validator(mode="after")
    def _ordered(self) -> SelectionConfig:
        if not self.lower <= self.upper:  # not a number compares with nothing
            raise ValueError(f"lower ({self.lower}) is above upper ({self.upper}): no response could be kept")
        return self


class PackingConfig(Section):
    length: int = Field(default=32768, ge=2, le=2 * LONGEST_TEXT)
    """Tokens in a training row (paper: 32,768)."""


class LossConfig(Section):
    divergence: DivergenceName = DIVERGENCES.default
    """Distance from teacher to student on the teacher's top-k: forward_kl (paper), or another of docs/objectives.md."""
    options: dict[str, Any] = {}
    """Options of the divergence: {beta: 0.5} of jensen_shannon, {alpha: 0.1} of the skewed ones; a plug-in's by its own
    names."""
    kd_weight: float = Field(default=0.9, ge=0, le=1)
    """Lambda: weight of the KL to the teacher against cross-entropy on the response (paper: 0.9)."""
    top_k_mass: Literal["raw", "renormalize", "tail"] = "raw"
    """raw: the teacher's top-k as they are (paper); renormalize: scaled to sum to one; tail: what is left over becomes
    one more symbol."""
    first_tokens: int | None = Field(default=None, ge=1, le=LONGEST_TEXT)
    """Loss on the first so many tokens of each response alone: rollouts, and references too, end there, with finish_reason
    "length", and so teacher, student and filter read no more either. Evaluation is not cut. null: whole responses."""


class TrainingConfig(Section):
    batch_tokens: int = Field(default=131072, ge=1, le=1 << 31)
    """Tokens (prompt and response) per optimiser step, over all processes; rounded down to whole rows, at least one."""
    micro_batch_rows: int = Field(default=1, ge=1, le=MANY)
    """Rows' worth of tokens in one forward pass, where samples lie end to end or in rows as short as they allow; the rest
    of a step is accumulated. Changes speed and memory, not the mathematics."""
    learning_rate: float = Field(default=1.0e-5, gt=0, le=1000)
    """Peak rate (paper)."""
    final_learning_rate: float = Field(default=1.0e-6, ge=0, le=1000)
    """Rate at the end of the cosine (paper)."""
    warmup_ratio: float = Field(default=0.03, ge=0, lt=1)
    """Share of the run in which the rate rises linearly."""
    weight_decay: float = Field(default=0.0, ge=0, le=1000)
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = Field(default=1.0, ge=1e-6, allow_inf_nan=True)
    """Gradients are clipped to this norm (paper); .inf clips none."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the training forward pass. auto: bfloat16 where the device is fast at it, else float32."""
    dropout: bool = False
    """Train with the student's own dropout and router jitter. The near-policy KL is then measured in a pass without them,
    which takes about a third more time."""
    gradient_checkpointing: bool | Literal["auto"] = "auto"
    """Recompute activations in the backward pass: less memory, about a third more time. auto: on a GPU whose memory a step
    would not fit otherwise, by the count that `--dry-run` shows; never on a CPU."""
    shard: Literal["auto", "none", "full"] = "auto"
    """Where several processes train: full divides each tensor, its gradient and its moments among their devices (FSDP2),
    none gives every device all of them (DDP). auto: full where a step would not fit a GPU otherwise, by the count that
    `--dry-run` shows; never on a CPU. The result is the same up to rounding."""
    compile: bool = False
    """Compile the student's decoder with torch.compile: faster steps, once compiling has taken its minutes. Not where
    it is sharded."""
    max_steps: int | None = Field(default=None, ge=1, le=1000 * MANY)
    """Stop after this many optimiser steps; the cosine then ends there."""
    max_tokens: int | None = Field(default=None, ge=1, le=10**15)
    """Stop once this many response tokens have been trained; the cosine then ends there."""


class PlacementConfig(Section):
    train: str | list[str] = "auto"
    """Device of the trainer: cpu, cuda:0, ...; one for each process of `accelerate launch`. auto: the CPU, or the first
    GPU (the first as many as there are processes)."""
    rollout: str | list[str] = "auto"
    """Devices of the background refresh, one process each. auto: every GPU that does not train, else the trainer's, taking
    turns with it; without a GPU the CPU. external: none here, `npd refresh --follow` makes the generations elsewhere. ray:
    actors of a Ray cluster make them (`placement.ray`; pip install 'npd[ray]')."""
    teacher: str | list[str] = "auto"
    """Devices of the teacher, one for each of `rollout` or one for all; of actors, among their own. auto: beside the
    rollout."""
    train_threads: int | None = Field(default=None, ge=1, le=1024)
    """CPU threads of the trainer while a refresh runs beside it; null: half of the cores, all where it has its own GPU."""
    rollout_threads: int | None = Field(default=None, ge=1, le=1024)
    """CPU threads of a refresh while it generates; null: its share of what the trainer leaves, and of all cores for
    generation 0, which the trainer waits for."""
    teacher_threads: int | None = Field(default=None, ge=1, le=1024)
    """CPU threads of a refresh while it scores; null: as rollout_threads."""
    ray: RayConfig = RayConfig()
    """The cluster and its actors, where rollout is ray."""


class CheckpointConfig(Section):
    every_steps: int = Field(default=200, ge=1, le=1000 * MANY)
    """Optimiser steps between checkpoints; what a crash can lose of training."""
    keep: int = Field(default=2, ge=1, le=MANY)
    """Newest checkpoints, student snapshots and generations kept, besides the first snapshot and whatever is still read."""
    restarts: int = Field(default=3, ge=0, le=MANY)
    """How often a background refresh that died is started again; one that finishes a part in between starts afresh."""
    mirror: MirrorURI | None = None
    """Where else to keep the run, so that it outlives this machine: s3://BUCKET/PATH, gs://, abfs://, or a path of another
    disk. With an empty run_dir the run that is there goes on here. Keys come from the environment (docs/guide.md)."""


class TaskConfig(Section):
    name: str
    """A reasoning-gym task, or `answer` for the `answer` column of data.eval."""
    size: int | None = Field(default=None, ge=1, le=MANY)
    """Problems asked; null asks 128 of a reasoning-gym task, and for `answer` every row of data.eval."""
    seed: int = 0
    """Seed of a reasoning-gym task's problems."""
    options: dict[str, Any] = {}
    """Options of the reasoning-gym task itself."""


class EvaluationConfig(Section):
    tasks: list[TaskConfig] = []
    """Tasks with a verifier: names, or {name, size, seed, options}."""
    every_passes: int = Field(default=1, ge=1, le=MANY)
    """Evaluate before training, after each so many passes, and at the end."""
    samples: int = Field(default=1, ge=1, le=65536)
    """Responses per problem; pass@k is estimated for every power of two up to it."""
    temperature: Temperature = 0.0
    """Sampling temperature for tasks; 0 is greedy."""
    max_new_tokens: int | None = Field(default=None, ge=1, le=LONGEST_TEXT)
    """Length of a response; null: as rollout.max_new_tokens."""
    teacher: bool = False
    """Ask the teacher the same tasks once, as the ceiling; a large one takes its time. Not with a served teacher."""
    kl_prompts: int = Field(default=128, ge=0, le=MOST_PROMPTS)
    """Prompts of data.eval on which the KL to the teacher is measured; 0 switches it off."""
    harness: HarnessConfig = HarnessConfig()
    """Benchmarks by lm-eval."""

    @field_validator("tasks", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        if isinstance(value, list):
            return [{"name": item} if isinstance(item, str) else item for item in value]
        return value

    @model_validator(mode="after")
    def _sampled(self) -> EvaluationConfig:
        names = [task.name for task in self.tasks]
        if len(set(names)) < len(names):
            raise ValueError(f"tasks has a name twice ({', '.join(names)}), and its figures would share one metric name")
        if self.samples > 1 and self.temperature == 0:
            raise ValueError("samples above 1 are all alike at temperature 0; set evaluation.temperature, e.g. to 1.0")
        return self


class TrackingConfig(Section):
    trackers: list[str] = ["tensorboard"]
    """Trackers by accelerate's names: tensorboard, wandb, trackio, ...; [] for none. metrics.jsonl is always written."""
    report: bool = True
    """Write report.html when the run ends, and now and then while it goes on. `npd report RUN_DIR` writes it at any time."""


class Config(Section):
    run_dir: Place
    """Where the run lives: configuration, snapshots, responses, checkpoints, metrics, the finished student."""
    seed: int = 0
    """The same seed gives the same run."""
    student: StudentConfig
    """The model that learns."""
    teacher: TeacherConfig | None = None
    """The model it learns from; `npd sft` on given references needs none."""
    teachers: dict[str, TeacherConfig] = {}
    """Teachers by the prompts' `source`, such as {math: {model: ...}, code: {server: ..., model: ...}}; `teacher` is for
    every other source."""
    data: DataConfig
    """Prompts in."""
    schedule: ScheduleConfig = ScheduleConfig()
    """When a generation starts and ends."""
    rollout: RolloutConfig = RolloutConfig()
    """How the student writes."""
    scoring: ScoringConfig = ScoringConfig()
    """How the teacher reads."""
    selection: SelectionConfig = SelectionConfig()
    """Which responses are trained on."""
    packing: PackingConfig = PackingConfig()
    """How samples share rows."""
    loss: LossConfig = LossConfig()
    """What is minimised."""
    training: TrainingConfig = TrainingConfig()
    """The optimiser loop."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """What a crash costs."""
    placement: PlacementConfig = PlacementConfig()
    """What runs where."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """What is measured along the way."""
    tracking: TrackingConfig = TrackingConfig()
    """Who else hears the figures."""
    plugins: list[Place] = []
    """Python modules to import first, by name or as paths of .py files: they bring engines, teachers, rules, divergences,
    producers and benchmarks of your own (docs/extending.md). Their code runs; name only what you trust."""
    provenance: dict[str, Any] | None = None
    """Written by npd into a run's config.yaml (command, package versions); ignored when read."""

    @property
    def has_teacher(self) -> bool:
        return bool(self.all_teachers)

    @property
    def all_teachers(self) -> dict[str | None, TeacherConfig]:
        """Every teacher by the source it is for; None is for all other sources. One that is the student itself has the
        student's weights as it started."""
        return {key: t.of_student(self.student) if t.is_student else t for key, t in self.given_teachers.items()}

    @property
    def given_teachers(self) -> dict[str | None, TeacherConfig]:
        """Every teacher as it was given, by the source it is for."""
        default: dict[str | None, TeacherConfig] = {} if self.teacher is None else {None: self.teacher}
        return default | dict(self.teachers)

    def teacher_of(self, source: str) -> str | None:
        """The key in `all_teachers` of the teacher that reads prompts of a source."""
        return source if source in self.teachers else None

    @property
    def response_tokens(self) -> int:
        """Tokens of a response that is trained on, at most."""
        return min(self.rollout.max_new_tokens, self.loss.first_tokens or self.rollout.max_new_tokens)

    @property
    def sampling(self) -> Sampling:
        """How the student's own responses are drawn."""
        rollout = self.rollout
        return Sampling(self.response_tokens, rollout.temperature, rollout.top_p, rollout.samples_per_prompt)

    @model_validator(mode="after")
    def _fits(self) -> Config:
        reward = self.selection.reward
        if reward == "contrast" and self.rollout.samples_per_prompt < 2:
            raise ValueError(
                "selection.reward contrast compares the responses to a prompt, but rollout.samples_per_prompt is 1; raise it"
            )
        if reward != "any" and not self.scoring.verify:
            raise ValueError(f"selection.reward {reward} needs scoring.verify: true")
        if self.evaluation.teacher and (self.teacher is None or self.teacher.server is not None):
            raise ValueError(
                "evaluation.teacher asks the teacher to answer tasks, which only one that is loaded here can: set "
                "teacher.model without a server, or evaluation.teacher: false"
            )
        prompts = self.schedule.prompts
        if isinstance(prompts, int) and prompts > self.rollout.part_size * MANY:
            raise ValueError(
                f"a generation of {prompts:,} prompts (schedule.prompts) in parts of {self.rollout.part_size:,} "
                f"(rollout.part_size) would have more than {MANY:,} of them; raise rollout.part_size"
            )
        longest = self.data.max_prompt_tokens + self.rollout.max_new_tokens
        if longest > self.packing.length:
            raise ValueError(
                f"a sample may have {longest} tokens (data.max_prompt_tokens {self.data.max_prompt_tokens} + "
                f"rollout.max_new_tokens {self.rollout.max_new_tokens}) but packing.length is {self.packing.length}; "
                "raise packing.length or lower one of the two"
            )
        return self
