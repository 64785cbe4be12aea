"""The losses as modules, shaped like those that people already use: swapping an import is the whole
migration.

Modules normalise what their originals normalise and hold what state those hold; the functions beneath are
pure. `gather_distributed` takes the keys of all ranks of the default process group.

The originals of DINO, SwAV and DISSL take a table of outputs (rows × prototypes); these take its two factors, the features
and the last layer's weight, and stream over it: no table is stored.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import normalize

from fastgessl.kernels.collectives import all_gather_rows, all_reduce_mean, check_equal_rows
from fastgessl.kernels.losses import clip_loss, nt_xent, sigma_kl, similarity_logsumexp
from fastgessl.kernels.prototypes import dissl_loss, sinkhorn_potentials, swapped_cross_entropy


def default_group(gather_distributed: bool) -> dist.ProcessGroup | None:
    """The default group if its ranks are to be gathered and there are several."""
    if not gather_distributed or not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    return dist.group.WORLD


def group_of_size(world_size: int) -> dist.ProcessGroup | None:
    """The default group, which must have so many ranks; none for one. Raises ValueError otherwise: no rank is
    left out without a word.
    """
    if world_size == 1:
        return None
    ranks = dist.get_world_size() if dist.is_initialized() else 0
    if ranks != world_size:
        found = (
            f"the default process group has {ranks} ranks"
            if ranks
            else "torch.distributed is not initialised"
        )
        raise ValueError(
            f"world_size is {world_size}, but {found}. Call init_process_group first, or pass the group's "
            "own size."
        )
    return dist.group.WORLD


class NTXentLoss(nn.Module):
    """SimCLR's loss, or MoCo's with a memory bank; lightly's signature. Normalises both inputs.

    With `memory_bank_size=(K, D)` the second input's rows are keys: row i's negatives are the bank, and the
    bank then takes the keys in. The bank moves in `forward` when the first input requires a gradient, as in
    lightly; `similarity_logsumexp` over a queue of your own is the pure form.

    >>> import torch
    >>> criterion = NTXentLoss(temperature=0.5)
    >>> loss = criterion(torch.randn(8, 16), torch.randn(8, 16))
    >>> loss.shape
    torch.Size([])
    """

    bank: Tensor
    bank_position: Tensor

    def __init__(
        self,
        temperature: float = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, found {temperature}.")
        size = (memory_bank_size,) if isinstance(memory_bank_size, int) else tuple(memory_bank_size)
        if size != (0,) and (len(size) != 2 or min(size) < 1):
            raise ValueError(f"memory_bank_size must be 0 or (rows, features), found {memory_bank_size}.")
        self.temperature = temperature
        self.gather_distributed = gather_distributed
        bank = normalize(torch.randn(size), dim=1) if len(size) == 2 else torch.empty(0, 0)
        self.register_buffer("bank", bank)
        self.register_buffer("bank_position", torch.zeros((), dtype=torch.long))

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """(N, D) twice -> ()."""
        group = default_group(self.gather_distributed)
        if not len(self.bank):
            return nt_xent(out0, out1, temperature=self.temperature, group=group)
        query, key = normalize(out0, dim=1), normalize(out1, dim=1)
        wide = torch.float64 if query.dtype == torch.float64 else torch.float32
        positive = (query.to(wide) * key.to(wide)).sum(1) / self.temperature
        negatives = similarity_logsumexp(query, self.bank.to(query.dtype), temperature=self.temperature)
        if out0.requires_grad:
            self.enqueue(all_gather_rows(key.detach(), group))
        return (torch.logaddexp(positive, negatives) - positive).mean()

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Overwrite the bank's oldest rows; what does not fit before its end is dropped, as in lightly."""
        size = len(self.bank)
        keys = keys[:size].to(self.bank.dtype)
        # The position stays on the device, so that the host need not wait for it. Keys past the end leave the
        # first rows as they are.
        rows = self.bank_position + torch.arange(len(keys), device=keys.device)
        first, fits = rows % size, (rows < size)[:, None]
        # A new tensor: the old one may still be needed by the backward of the loss that was computed on it.
        self.bank = self.bank.index_copy(0, first, torch.where(fits, keys, self.bank[first]))
        self.bank_position.copy_((self.bank_position + len(keys)).clamp(max=size) % size)


class ClipLoss(nn.Module):
    """CLIP's symmetric loss; open_clip's signature. Features come normalised, `logit_scale` is 1/temperature.

    Every rank computes the loss of its own pairs against all ranks' and gradients flow through the gather:
    open_clip's `local_loss=True, gather_with_grad=True`, whatever is passed. open_clip's gradients without
    `gather_with_grad` are, after DDP's averaging, those of the ranks' own features only, 1/world_size of
    these with `local_loss=False`. There are no labels to cache, and `rank` is the group's own. Raises
    ValueError with `use_horovod`.

    >>> import torch
    >>> criterion, logit_scale = ClipLoss(), torch.tensor(10.0, requires_grad=True)
    >>> criterion(torch.eye(4), torch.eye(4), logit_scale).backward()
    >>> logit_scale.grad
    tensor(-0.0001)
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ) -> None:
        super().__init__()
        if use_horovod:
            raise ValueError(
                "ClipLoss gathers with torch.distributed, found use_horovod=True. Launch with torchrun "
                "instead."
            )
        self.world_size = world_size

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict:
        """(N, D) twice and () -> (), or {"contrastive_loss": ()}.

        A `logit_bias` (), the same for all pairs, cancels in the softmax: its gradient is 0. Raises
        ValueError if `world_size` is above 1 and not that of the default group.
        """
        if isinstance(logit_bias, bool) or (isinstance(logit_bias, Tensor) and logit_bias.dim() > 0):
            raise ValueError(
                f"logit_bias must be a number or a 0-d tensor, found {logit_bias}. Pass output_dict by its "
                "name."
            )
        loss = clip_loss(
            image_features, text_features, temperature=1 / logit_scale, group=group_of_size(self.world_size)
        )
        if logit_bias is not None:
            # DDP waits for a gradient of every parameter.
            loss = loss + 0 * logit_bias
        return {"contrastive_loss": loss} if output_dict else loss


class SupConLoss(nn.Module):
    """Supervised contrastive loss, Khosla et al. 2020, eq. (2): several positives a row, all rows of its
    class; SupContrast's signature.

    Since a row's positives enter linearly, they count as their mean key: loss_i = lse_i - q_i·(mean key of
    the class)/τ, without a mask of pairs. `contrast_mode` "one" takes the first views only as rows, "all" all
    of them.

    >>> import torch
    >>> features = torch.nn.functional.normalize(torch.randn(8, 2, 16), dim=2)
    >>> SupConLoss()(features, torch.arange(8) % 3).shape
    torch.Size([])
    """

    def __init__(
        self, temperature: float = 0.07, contrast_mode: str = "all", base_temperature: float = 0.07
    ) -> None:
        super().__init__()
        if contrast_mode not in ("all", "one"):
            raise ValueError(f"contrast_mode must be 'all' or 'one', found {contrast_mode!r}.")
        self.temperature, self.contrast_mode, self.base_temperature = (
            temperature,
            contrast_mode,
            base_temperature,
        )

    def forward(self, features: Tensor, labels: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Normalised features (N, V, …) of V views, classes (N,) or (N, 1) (without them every image is its
        own class) -> ().

        Instead of classes a `mask` (N, N): how much image j counts as a positive of image i. Raises
        ValueError for other shapes, and for both. A row without a positive has zero loss and is counted.
        Computed in float32 at least, under autocast too.
        """
        if features.dim() < 3:
            raise ValueError(
                f"features must have shape (images, views, features), found {tuple(features.shape)}."
            )
        images, views = features.shape[:2]
        # lse and the positives nearly cancel where the positives are nearly certain. With lse of rows rounded
        # to bfloat16, as autocast has it, gradients at a loss of 1.5e-3 were off by 1.4 of their norm, in
        # float32 by 1.1e-4.
        with torch.autocast(features.device.type, enabled=False):
            rows = features.flatten(2).transpose(0, 1).flatten(0, 1)
            rows = rows.to(torch.float64 if rows.dtype == torch.float64 else torch.float32)
            mean_key, lonely = _mean_positives(rows, images, labels, mask)
            anchors = images if self.contrast_mode == "one" else images * views
            own = torch.arange(anchors, device=rows.device)
            lse = similarity_logsumexp(rows[:anchors], rows, temperature=self.temperature, exclude=own)
            losses = lse - (rows * mean_key)[:anchors].sum(1) / self.temperature
            return (self.temperature / self.base_temperature) * losses.masked_fill(
                lonely[:anchors], 0.0
            ).mean()


def _mean_positives(
    rows: Tensor, images: int, labels: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Rows (V·N, D), view by view -> the mean of each row's positives (V·N, D), itself not among them; and
    who has none (V·N,).
    """
    views, sums = len(rows) // images, rows.unflatten(0, (-1, images)).sum(0)
    if labels is not None and mask is not None:
        raise ValueError("labels and mask both say what a positive is; pass one of them.")
    if mask is not None:
        if mask.shape != (images, images):
            raise ValueError(
                f"mask must have shape ({images}, {images}), one entry a pair of images; found "
                f"{tuple(mask.shape)}."
            )
        weight = mask.to(rows)
        sums, total, own = weight @ sums, weight.sum(1), weight.diagonal()
    else:
        labels = torch.arange(images, device=rows.device) if labels is None else labels
        if labels.shape not in ((images,), (images, 1)):
            raise ValueError(
                f"labels must have shape ({images},), one a row of features; found {tuple(labels.shape)}."
            )
        classes = labels.flatten().to(rows.device).unique(return_inverse=True)[1]
        sums = sums.new_zeros(int(classes.max()) + 1, sums.shape[1]).index_add(0, classes, sums)[classes]
        total, own = classes.bincount()[classes].to(rows.dtype), rows.new_ones(images)
    others = (views * total - own).repeat(views)[:, None]
    mean = (sums.repeat(views, 1) - own.repeat(views)[:, None] * rows) / others.masked_fill(others == 0, 1.0)
    return mean, others[:, 0] == 0


class SigmaLoss(nn.Module):
    """GeSSL's σ: KL from a teacher's similarity softmax to the student's, with the teacher detached.
    Normalises all operands.

    >>> import torch
    >>> views = torch.randn(2, 8, 16)
    >>> SigmaLoss(temperature=0.2)(*views, *views) < 1e-6
    tensor(True)
    """

    def __init__(self, temperature: float = 0.1, teacher_temperature: float | None = None) -> None:
        super().__init__()
        self.temperature, self.teacher_temperature = temperature, teacher_temperature

    def forward(
        self, student_query: Tensor, student_key: Tensor, teacher_query: Tensor, teacher_key: Tensor
    ) -> Tensor:
        """(M, D), (N, D), (M, E), (N, E) -> ()."""
        student = (normalize(part, dim=1) for part in (student_query, student_key))
        teacher = (normalize(part.detach(), dim=1) for part in (teacher_query, teacher_key))
        return sigma_kl(
            *student, *teacher, temperature=self.temperature, teacher_temperature=self.teacher_temperature
        )


class DINOLoss(nn.Module):
    """Self-distillation with a centred teacher, Caron et al. 2021, eq. (3) and (4).

    Cross-entropy from the teacher's softmax((t - c)/τ_t) to the student's, over all pairs of different views.
    The centre is the column bias -c/τ_t; c is a buffer that `update_center` moves, once after each optimiser
    step.

    >>> import torch
    >>> criterion = DINOLoss(output_dim=32)
    >>> teacher, student = torch.randn(2, 8, 16), torch.randn(4, 8, 16)
    >>> weight = torch.randn(32, 16)
    >>> loss = criterion(teacher, weight, student, weight)
    >>> criterion.update_center(teacher, weight)
    """

    center: Tensor

    def __init__(
        self,
        output_dim: int = 65536,
        teacher_temp: float = 0.04,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
    ) -> None:
        super().__init__()
        self.teacher_temp, self.student_temp, self.center_momentum = (
            teacher_temp,
            student_temp,
            center_momentum,
        )
        self.register_buffer("center", torch.zeros(output_dim))

    def forward(
        self,
        teacher_features: Sequence[Tensor],
        teacher_prototypes: Tensor,
        student_features: Sequence[Tensor],
        student_prototypes: Tensor,
        teacher_temp: float | None = None,
    ) -> Tensor:
        """Features (N, D) of each view, the teacher's first; prototypes (K, D) -> ()."""
        if len(teacher_features) == len(student_features) == 1:
            raise ValueError(
                "DINOLoss needs a view of the student that is not the teacher's; found one view of each."
            )
        temperature = self.teacher_temp if teacher_temp is None else teacher_temp
        teacher = torch.stack(list(teacher_features)).detach()
        return swapped_cross_entropy(
            torch.stack(list(student_features)),
            student_prototypes,
            teacher,
            teacher_prototypes.detach(),
            temperature=self.student_temp,
            teacher_temperature=temperature,
            teacher_biases=(-self.center / temperature).expand(len(teacher), -1),
        )

    @torch.no_grad()
    def update_center(self, teacher_features: Sequence[Tensor], teacher_prototypes: Tensor) -> None:
        """c <- m·c + (1 - m)·mean output of the teacher over views and ranks. The mean of outputs is the
        output of the mean.

        Raises ValueError if the ranks hold unequal numbers of rows.
        """
        rows, group = torch.cat(list(teacher_features)), dist.group.WORLD if dist.is_initialized() else None
        if group is not None:
            check_equal_rows(rows, group, "teacher_features")
        # The centre stays float32: autocast would make the product bfloat16, which lerp_ refuses.
        with torch.autocast(rows.device.type, enabled=False):
            mean = all_reduce_mean(rows.to(self.center.dtype).mean(0), group)
            self.center.lerp_(teacher_prototypes.to(mean.dtype) @ mean, 1 - self.center_momentum)


class SwaVLoss(nn.Module):
    """Swapped prediction of balanced assignments, Caron et al. 2020, eq. (2); lightly's signature, with
    prototypes beside the features.

    Features and prototypes come normalised. Codes are computed on the high-resolution views, with a queue's
    rows if given, and carry no gradient.

    >>> import torch
    >>> views = torch.nn.functional.normalize(torch.randn(4, 8, 16), dim=2)
    >>> prototypes = torch.nn.functional.normalize(torch.randn(32, 16), dim=1)
    >>> SwaVLoss()(views[:2], views[2:], prototypes).shape
    torch.Size([])
    """

    def __init__(
        self,
        temperature: float = 0.1,
        sinkhorn_iterations: int = 3,
        sinkhorn_epsilon: float = 0.05,
        sinkhorn_gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        self.temperature, self.iterations, self.epsilon = temperature, sinkhorn_iterations, sinkhorn_epsilon
        self.gather_distributed = sinkhorn_gather_distributed

    def forward(
        self,
        high_resolution_features: Sequence[Tensor],
        low_resolution_features: Sequence[Tensor],
        prototypes: Tensor,
        queue_features: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Features (N, D) of each view, prototypes (K, D), a queue (L, D) a high-resolution view -> ()."""
        if len(high_resolution_features) + len(low_resolution_features) < 2:
            raise ValueError("SwaVLoss needs a second view to predict the codes from; found one view in all.")
        group = default_group(self.gather_distributed)
        potentials = [
            sinkhorn_potentials(
                target if queue_features is None else torch.cat([target, queue_features[view]]),
                prototypes,
                epsilon=self.epsilon,
                iterations=self.iterations,
                group=group,
            )
            for view, target in enumerate(high_resolution_features)
        ]
        return swapped_cross_entropy(
            torch.stack([*high_resolution_features, *low_resolution_features]),
            prototypes,
            torch.stack(list(high_resolution_features)).detach(),
            prototypes.detach(),
            temperature=self.temperature,
            teacher_temperature=self.epsilon,
            teacher_biases=torch.stack(potentials),
        )


class DISSLLoss(nn.Module):
    """Distillation to a teacher without stop-gradient, kept spread out by its mean assignment's entropy,
    Dubois et al. 2022, eq. (10).

    CE(p(x1), q(x2)) - λ·H[mean p(x1)] + β·CE(p(x1), p(x2)), averaged over both directions; p =
    softmax(teacher/τ_t), q = softmax(student/τ_s).

    >>> import torch
    >>> student, teacher = torch.randn(2, 8, 16), torch.randn(2, 8, 24)
    >>> DISSLLoss()(student, torch.randn(32, 16), teacher, torch.randn(32, 24)).shape
    torch.Size([])
    """

    def __init__(
        self,
        entropy_weight: float = 2.3,
        invariance_weight: float = 0.8,
        teacher_temperature: float = 0.5,
        student_temperature: float = 1.0,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        self.entropy_weight, self.invariance_weight = entropy_weight, invariance_weight
        self.teacher_temperature, self.student_temperature = teacher_temperature, student_temperature
        self.gather_distributed = gather_distributed

    def forward(
        self,
        student_features: Sequence[Tensor],
        student_prototypes: Tensor,
        teacher_features: Sequence[Tensor],
        teacher_prototypes: Tensor,
    ) -> Tensor:
        """Both views' features (N, D) and (N, E), the last layers' weights (K, D) and (K, E) -> ()."""
        return dissl_loss(
            torch.stack(list(student_features)),
            student_prototypes,
            torch.stack(list(teacher_features)),
            teacher_prototypes,
            temperature=self.student_temperature,
            teacher_temperature=self.teacher_temperature,
            entropy_weight=self.entropy_weight,
            invariance_weight=self.invariance_weight,
            group=default_group(self.gather_distributed),
        )
