"""The sections of a recipe: every key, its rule, its default and what it means."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, model_validator

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Rates = Literal["constant", "cosine", "one_cycle", "step"]
Names = Annotated[tuple[str, ...], Field(strict=False)]


class Section(BaseModel):
    """Base of all sections: unknown keys are refused, values are not converted, instances do not change."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)


class Data(Section):
    """Where the images come from and how they are split."""

    name: str = "digits"
    """dataset: digits (embedded), mnist, fashion_mnist, cifar10, cifar100, celeba, imagefolder, hf:NAME_OR_FOLDER"""
    root: str | None = None
    """folder of train.parquet and test.parquet, itself or in a folder called NAME, or torchvision's or class folders"""
    download: bool = False
    """let torchvision (hf: datasets) download the dataset into root"""
    image_size: Count | None = None
    """scale the images to this height and width, what is longer being cut off (null: as they are)"""
    validation: Share = 0.1
    """fraction of the training images that is held out for validation"""
    test: Share = 0.2
    """fraction of all images that is the test set, for datasets without one"""
    limit: Count | None = None
    """use at most this many training images"""
    normalize: bool = False
    """subtract the mean and divide by the deviation of the training images, per channel (not for autoencoders)"""
    augment: Literal[
        "none",
        "flip",
        "crop",
        "flip_crop",
        "flip_zero_crop",
        "flip_crop_cutout",
        "flip_resized_crop",
        "flip_resized_crop_light",
    ] = "none"
    """done to training images at random: mirror, shift by up to 4 pixels, hide a square, enlarge a part, light"""


class Model(Section):
    """The network."""

    name: str = "s3"
    """registry name, torchvision:NAME, timm:NAME, transformers:CLASS or package.module:factory"""
    args: dict[str, JsonValue] = {}
    """arguments of the builder; classes, channels and image size are filled in where the builder has them"""
    checkpoint: str | None = None
    """a .safetensors file with trained weights (of secateur, or a plain state dict)"""


class Train(Section):
    """Training of the dense model."""

    epochs: Annotated[int, Field(ge=0)] = 10
    """passes over the training images; 0 leaves the model as it is (with a checkpoint)"""
    batch_size: Count = 32
    optimizer: Literal["adam", "adamw", "rmsprop", "sgd"] = "adam"
    lr: Positive = 1e-3
    """base learning rate"""
    rate: Rates = "constant"
    """how the learning rate falls (one_cycle: rises first)"""
    drops: Annotated[tuple[Share, ...], Field(strict=False)] = (0.3, 0.6, 0.8)
    """of rate step: the fractions of the training at which the rate drops"""
    drop_factor: Share = 0.2
    """of rate step: what each drop multiplies the rate by"""
    warmup: NotNegative = 0.0
    """epochs in which the rate first rises from 1 % of lr; less than epochs"""
    weight_decay: NotNegative = 0.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """momentum of sgd and rmsprop, first beta of adam and adamw"""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    clip_norm: Positive | None = None
    """largest norm of all gradients together"""
    mixup: NotNegative = 0.0
    """train on blends of two images, their weight drawn from Beta(mixup, mixup); 0: off, 0.2 is usual"""
    ema: Share | None = None
    """validate and keep a moving average of the weights with this decay, 0.999 is usual (null: off)"""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """of products and convolutions while training; auto: bfloat16 where the GPU or CPU has it and it pays"""
    channels_last: Literal["auto"] | bool = "auto"
    """lay images out pixel by pixel while training (NHWC); auto: for convolutions that run that way"""
    compile: bool = False
    """run the training passes through torch.compile; pays where training is long"""


class Costs(Section):
    """What a unit costs, taken off its score; fractions of the model's cost that its removal saves."""

    macs: NotNegative = 0.0
    """weight of the multiply-accumulates"""
    params: NotNegative = 0.0
    """weight of the parameters"""


class Score(Section):
    """The criterion: how good a unit is."""

    name: str = "taylor"
    """taylor, fisher, contribution, magnitude, bn_scale, random"""
    args: dict[str, JsonValue] = {}
    """arguments of the criterion, e.g. {form: elementwise} of taylor, {p: 1} of magnitude"""
    evidence: Literal["pass", "training"] = "pass"
    """where data is read: in a pass of its own before each cut, or in the last epoch of training before it"""
    every: Count | None = None
    """of training: each so-many-th batch, of contribution image, is read (null: at most 8, and `samples` or more)"""
    samples: Count = 1024
    """training images that are shown to the criterion in a pass"""
    batch_size: Count = 256
    normalise: bool = False
    """divide the scores of each group by their L2 norm, before the cost is taken off"""
    cost: Costs = Costs()
    """score - macs * share of MACs - params * share of parameters"""
    worst: bool = False
    """turn the scores round, so that the most important units go first: a control"""

    @property
    def rides(self) -> bool:
        """Whether the evidence is gathered while training."""
        return self.evidence == "training"


class Keep(Section):
    """The budget: exactly one of these fractions stays at the end."""

    units: Fraction | None = None
    """fraction of all units in prunable groups"""
    params: Fraction | None = None
    """fraction of the parameters of the model; of kernels and weights, of the weights that can be masked"""
    macs: Fraction | None = None
    """fraction of the multiply-accumulates of the model"""

    @model_validator(mode="after")
    def _one(self) -> Self:
        given = [k for k, v in self if v is not None]
        if len(given) != 1:
            found = ", ".join(given) or "none"
            raise ValueError(
                f"give exactly one of units, params, macs; found {found} "
                "(to replace it on the command line: 'prune.budget={macs: 0.5}')"
            )
        return self


class When(Section):
    """The schedule: how many cuts lead to the budget."""

    name: Literal["cubic", "during", "every", "iterative", "once"] = "iterative"
    """once; iterative: equal cuts; cubic: large ones first; every: some units at a time; during: while training"""
    steps: Annotated[int, Field(ge=1, le=1000)] = 1
    """number of cuts (of iterative and cubic)"""
    units: Count = 1
    """units that go in one cut of every; recover.epochs or recover.steps is the training in between"""
    total_epochs: Count = 100
    """epochs of training in all (of during)"""
    initial_iterations: Annotated[
        int, Field(ge=0, validation_alias=AliasChoices("initial_iterations", "inital_iterations"))
    ] = 30
    """epochs before the first cut (of during; all of total_epochs: no cut)"""
    increment: Count = 10
    """epochs from one cut to the next (of during)"""
    keep: Fraction | None = None
    """fraction of each group's present units that stays in one cut of during (null: what leads to the budget)"""

    @property
    def training(self) -> bool:
        """Whether the cuts are events of one training."""
        return self.name == "during"

    @property
    def events(self) -> int:
        """Cuts of during: those at epochs I, I + D, I + 2 D, ... before T."""
        return max(0, -(-(self.total_epochs - self.initial_iterations) // self.increment))

    @property
    def last(self) -> int:
        """Epochs that follow the last cut of during."""
        return self.total_epochs - self.initial_iterations - (self.events - 1) * self.increment

    @property
    def cuts(self) -> int:
        """Number of cuts, where the schedule says it."""
        return self.events if self.training else self.steps

    @property
    def several(self) -> bool:
        """Whether there can be more than one cut."""
        return self.name == "every" or (self.name != "once" and self.cuts > 1)


class Prune(Section):
    """What goes, and when."""

    granularity: Literal["channel", "head", "kernel", "neuron", "weight"] | None = None
    """units that go: kernel or weight are set to zero and held there, the others cut out (null: all that can be cut)"""
    criterion: Score = Score()
    budget: Keep = Keep(units=0.5)
    allocation: Literal["uniform", "global", "isomorphic"] = "global"
    """how the budget is split over the groups"""
    normalise: Literal["auto", "mean", "l2", "none"] = "auto"
    """what scores are divided by before those of different groups are compared; auto: mean (none: of masks)"""
    schedule: When = When()
    save_every: Count | None = None
    """of schedule every: cut while training goes on, by masks, and write a checkpoint after so many cuts"""
    plan: str | None = None
    """plan or history of another run of this model: cut what it says (criterion and budget are not used)"""
    events: Count | None = None
    """of plan: take this many events of a history (null: all)"""
    profile: str | None = None
    """plan or history of a run: the fractions that stay in its groups are copied, scaled to the budget"""
    round_to: Literal["auto"] | Count | None = "auto"
    """widths become multiples of this; auto: of 8 in groups that are wide enough; null: any width"""
    min_units: Annotated[int, Field(ge=0)] = 1
    """units that stay in every group; 0: blocks with a way around them, such as a shortcut, may lose all"""
    exact_only: bool = False
    """cut only groups where the masked and the smaller model are the same function"""
    keep: dict[str, Fraction] = {}
    """group or module name pattern -> fraction of its units that stays"""
    only: Names = ()
    """group or module name patterns: no other units count or go (empty: all that can be cut)"""
    freeze: Names = ()
    """group or module name patterns that stay whole"""
    stop_drop: Share | None = None
    """stop when a recovered model lost more validation accuracy (ELBO: this fraction) than this, keep the one before"""


class Distil(Section):
    """Distillation: (1 - mix) loss + mix T^2 KL of the scores + features * difference of the last hidden layer."""

    temperature: Positive = 4.0
    """T, what the scores are divided by"""
    mix: Annotated[float, Field(ge=0, le=1)] = 0.9
    """share of the teacher"""
    features: NotNegative = 0.0
    """weight of how differently both see which images are alike; 0: off, 3000 in its source"""


class Recover(Section):
    """What happens after each cut."""

    name: Literal["distil", "finetune", "none", "rewind", "scratch"] = "finetune"
    """distil: the dense model teaches; rewind: back to an epoch of its training; scratch: new weights at the end"""
    epochs: Annotated[int, Field(ge=0)] = 1
    """epochs after each cut but the last"""
    steps: Count | None = None
    """optimiser steps after each cut but the last, in place of epochs"""
    final_epochs: Annotated[int, Field(ge=0)] | None = None
    """epochs after the last cut (null: the same; of scratch: those of train)"""
    lr: Positive | None = None
    """base learning rate (null: that of train; all other options are those of train)"""
    rate: Rates | None = None
    """how the learning rate falls (null: as in train)"""
    warmup: NotNegative = 0.0
    """epochs in which the rate first rises from 1 % of lr; less than epochs"""
    recalibrate: Annotated[int, Field(ge=0)] = 0
    """right after each cut, batches of training images that renew the statistics of batch norms (0: off)"""
    carry_optimizer: bool = False
    """keep the momenta of the units that stay; otherwise each recovery starts with a new optimiser"""
    distil: Distil = Distil()
    scratch: Literal["epochs", "compute"] = "epochs"
    """scratch trains as many epochs as the dense model, or (compute) so many that the work is the same"""
    rewind: Annotated[int, Field(ge=0)] = 1
    """epoch of the dense training, 0 its beginning, that rewind goes back to"""


class Fbs(Section):
    """Feature boosting and suppression: each input computes a part of the channels of each gated layer."""

    densities: Annotated[
        tuple[Fraction, ...],
        Field(strict=False, min_length=1, validation_alias=AliasChoices("densities", "density")),
        BeforeValidator(lambda given: [given] if isinstance(given, float | int) else given),
    ] = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
    """fractions of the channels that are computed (also: density, one), one after another; training goes on at each"""
    load: str | None = None
    """a gated.safetensors of this network with weights to begin with (set train.epochs to 0)"""
    layers: dict[str, Fraction] = {}
    """module name pattern -> density of its layers, in place of densities (1: their gates only boost)"""
    everywhere: bool = False
    """gates wherever a plan would cut (linear layers, bottlenecks, shared masks); false: Conv-BN-activation chains"""
    pooling: Literal["avg", "l1", "l2", "max"] = "l1"
    """what a predictor sees of each input channel; avg says little of signed inputs"""
    threshold: Literal["local", "online"] = "online"
    """online: exactly the largest saliencies; local: those above a running threshold, cheaper, on average as many"""
    scale: Literal["gate", "norm"] = "gate"
    """what keeps the scale of a batch norm: gate, the saliencies begin with it; norm, they begin with 1"""
    penalty: NotNegative = 1e-8
    """weight of the L1 norm of the saliencies, mean over the images"""
    alone: Annotated[int, Field(ge=0)] = 0
    """epochs at the first density in which the gates alone learn, before all weights do"""
    epochs: Count = 1
    """epochs at each density, each with a new optimiser"""
    reset_epochs: bool = True
    """the learning rate begins anew at each density (false: it falls once, over all of them)"""
    lr: Annotated[Positive | None, Field(validation_alias=AliasChoices("lr", "initial"))] = None
    """base learning rate (also: initial; null: that of recover, or of train)"""
    rate: Rates | None = None
    """how the learning rate falls at each density (null: as in recover, or in train)"""


class Rnp(Section):
    """Runtime neural pruning: a controller says for each input how many channel groups each convolution computes."""

    groups: Annotated[int, Field(ge=2)] = 4
    """nested groups of the channels of each convolution; an action computes the first so many"""
    order: Literal["criterion", "given"] = "criterion"
    """criterion: the channels are first put in the order of prune.criterion, best in front; given: as they are"""
    penalty: Annotated[float, Field(le=0, allow_inf_nan=False)] = -0.1
    """p, the reward of each further group; the one dial between accuracy and work"""
    rounds: Count = 10
    """M: how often the controller and the network learn in turns"""
    policy_steps: Count = 100
    """N1: updates of the controller in a round"""
    backbone_steps: Annotated[int, Field(ge=0)] = 100
    """N2: updates of the network in a round"""
    alpha: Positive | None = None
    """factor of the loss in the last reward (null: such that its running mean is 1)"""
    gamma: Fraction = 1.0
    """factor of later rewards"""
    anneal: Fraction = 0.5
    """fraction of the updates of the controller in which the chance of a random action falls from 1 to 0.1"""
    renew: Count = 20
    """updates of the controller from one copy for the targets to the next"""
    policy_lr: Positive = 1e-3
    """learning rate of the controller (Adam)"""
    lr: Positive | None = None
    """base learning rate of the network (null: that of recover, or of train)"""
    rate: Rates | None = None
    """how the learning rate of the network falls over all rounds (null: as in recover, or in train)"""
    embed: Count = 64
    """width of what the controller sees of a layer"""
    hidden: Count = 128
    """width of the state of the controller"""
    budgets: Annotated[tuple[Fraction, ...], Field(strict=False)] = ()
    """fractions of the multiply-accumulates that the finished model is tested at too, by a bias on its values"""


class Track(Section):
    """Where a run is copied while it works; its folder is always whole."""

    mlflow: str | None = None
    """MLflow server or store: http://HOST:5000, sqlite:///FILE, or env: the one in MLFLOW_TRACKING_URI (null: none)"""
    experiment: str | None = None
    """experiment in MLflow (null: name of the recipe)"""
    wait: NotNegative = 5.0
    """seconds that the end of a run gives what is still being sent; `secateur track push` sends the rest"""


class Measure(Section):
    """What is measured at the end."""

    batch_sizes: Annotated[tuple[Count, ...], Field(strict=False, min_length=1)] = (1, 64)
    """batch sizes at which latency is measured"""
    repeats: Count = 50
    """interleaved rounds of the latency measurement"""
