"""MoE blocks that route inside their own forward, each written the way people write them.

Every block takes `[B, S, D]` (or `[T, D]`) and gives back the same shape, some with more beside it.

Legend: B sequences, S positions, T tokens, D hidden, F inner, E experts, K choices per token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

D, INNER, E, K = 12, 8, 6, 2


class GLU(nn.Module):
    """One expert: gated, without biases."""

    def __init__(self, hidden: int = D, inner: int = INNER) -> None:
        super().__init__()
        self.w1 = nn.Linear(hidden, inner, bias=False)
        self.w2 = nn.Linear(inner, hidden, bias=False)
        self.w3 = nn.Linear(hidden, inner, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(D, INNER), nn.GELU(), nn.Linear(INNER, D))


class SoftmaxTopk(nn.Module):
    """mixtral, qwen3_moe, olmoe: softmax, top-k, normalise, loop with torch.where."""

    normalise = True

    def __init__(self) -> None:
        super().__init__()
        self.num_experts, self.top_k, self.jitter = E, K, 0.0
        self.gate = nn.Linear(D, E, bias=False)
        self.experts = nn.ModuleList(GLU() for _ in range(E))

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = F.softmax(logits, dim=1, dtype=torch.float).topk(self.top_k, dim=-1)
        if self.normalise:
            weights /= weights.sum(dim=-1, keepdim=True)
        return weights, ids

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shape = x.shape
        if self.training and self.jitter:
            x *= torch.empty_like(x).uniform_(1 - self.jitter, 1 + self.jitter)
        x = x.view(-1, shape[-1])
        logits = self.gate(x)
        weights, ids = self.route(logits)
        weights = weights.to(x.dtype)
        out = torch.zeros_like(x)
        mask = F.one_hot(ids, num_classes=self.num_experts).permute(2, 1, 0)
        for e in torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero():
            slot, token = torch.where(mask[e].squeeze(0))
            given = x[None, token].reshape(-1, shape[-1])
            done = self.experts[e](given) * weights[token, slot, None]
            out.index_add_(0, token, done.to(x.dtype))
        return out.reshape(shape), logits


class Unnormalised(SoftmaxTopk):
    """qwen2_moe, olmoe by default."""

    normalise = False


class InPlace(nn.Module):
    """Normalises and scales the weights where they are; the output of an expert as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(D, E, bias=False)
        self.experts = nn.ModuleList(GLU() for _ in range(E))

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.gate(x).softmax(-1).topk(K, dim=-1)
        weights.div_(weights.sum(-1, keepdim=True))
        weights.mul_(2.5)
        out = torch.zeros_like(x)
        for e in range(E):
            *token, slot = torch.where(ids == e)
            at = tuple(token)
            out.index_put_(at, self.experts[e](x[at]) * weights[(*at, slot, None)], accumulate=True)
        return out


class SparseMixer(SoftmaxTopk):
    """phimoe: two rounds of max, the first choice masked in the second; no top-k at all."""

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        best, first = logits.max(dim=-1, keepdim=True)
        far = (best - logits) / logits.abs().clamp(min=best) > 0.02
        one = logits.masked_fill(far, -torch.inf).softmax(-1).gather(-1, first)
        rest = logits.scatter(-1, first, -torch.inf)
        best, second = rest.max(dim=-1, keepdim=True)
        far = (best - logits) / logits.abs().clamp(min=best) > 0.02
        two = rest.masked_fill(far, -torch.inf).softmax(-1).gather(-1, second)
        return torch.concat((one, two), dim=-1), torch.concat((first, second), dim=-1)


class GroupGate(nn.Module):
    """deepseek: sigmoid, a bias for selection alone, the best groups only, scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(E, D))
        self.register_buffer("e_score_correction_bias", torch.randn(E) / 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.view(-1, x.shape[-1])
        scores = F.linear(x.float(), self.weight.float()).sigmoid()
        ranked = scores + self.e_score_correction_bias
        by_group = ranked.view(len(x), 3, -1)
        groups = by_group.topk(2, dim=-1)[0].sum(-1).topk(2, dim=-1, sorted=False)[1]
        allowed = torch.zeros(len(x), 3).scatter_(1, groups, 1).repeat_interleave(2, 1)
        ids = ranked.masked_fill(~allowed.bool(), 0.0).topk(K, dim=-1, sorted=False)[1]
        weights = scores.gather(1, ids)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * 2.5
        return ids, weights


class DeepSeek(nn.Module):
    """deepseek_v3 remote code: shared experts; tokens sorted by expert when not training."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = GroupGate()
        self.experts = nn.ModuleList(GLU() for _ in range(E))
        self.shared_experts = GLU()

    def forward(self, x: Tensor) -> Tensor:
        ids, weights = self.gate(x)
        flat = x.view(-1, x.shape[-1])
        if self.training:
            wide = flat.repeat_interleave(K, dim=0)
            y = torch.empty_like(wide)
            chosen = ids.view(-1)
            for e, expert in enumerate(self.experts):
                y[chosen == e] = expert(wide[chosen == e])
            y = (y.view(*weights.shape, -1) * weights.unsqueeze(-1)).sum(1)
        else:
            y = self.infer(flat, ids, weights)
        return y.view(x.shape) + self.shared_experts(x)

    @torch.no_grad()
    def infer(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        sizes = ids.new_zeros((len(ids), E)).scatter_(1, ids, 1).sum(0)
        order = ids.view(-1).argsort()
        rows, outputs, start = x[order // K], [], 0
        for e, size in enumerate(sizes.numpy()):
            if size:
                outputs.append(self.experts[e](rows[start : start + size]))
                start += size
        sorted_y = torch.cat(outputs)
        y = torch.empty_like(sorted_y)
        y[order] = sorted_y
        y = y.view(*ids.shape, -1).type(weights.dtype).mul_(weights.unsqueeze(-1))
        return y.sum(1).type(sorted_y.dtype)


class Parallel(nn.Module):
    """Experts stacked in one parameter, called with sorted tokens and their counts."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(E, outputs, inputs))

    def forward(self, x: Tensor, sizes: list[int]) -> Tensor:
        return torch.cat([F.linear(part, self.weight[e]) for e, part in enumerate(x.split(sizes))])


class SortedMoE(nn.Module):
    """granitemoe of transformers 4, by other names: top-k, then softmax over the k; sorted."""

    def __init__(self) -> None:
        super().__init__()
        self.rows_in, self.rows_out = Parallel(D, 2 * INNER), Parallel(INNER, D)
        self.router = nn.Linear(D, E, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        flat = x.reshape(-1, D)
        logits = self.router(flat).float()
        top, ids = logits.topk(K, dim=1)
        gates = top.softmax(1).type_as(x)
        sizes = torch.zeros_like(logits).scatter(1, ids, 1).long().sum(0).tolist()
        _, order = ids.flatten().sort(0)
        token, by_row = order.div(K, rounding_mode="trunc"), gates.flatten()[order]
        left, right = self.rows_in(flat[token], sizes).chunk(2, dim=-1)
        y = self.rows_out(F.silu(left) * right, sizes) * by_row[:, None]
        return torch.zeros_like(flat).index_add(0, token, y).view(x.shape), logits


class GroupedExperts(nn.Module):
    """aria: a batch of products over stacked experts."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Parameter(torch.empty(E, D, 2 * INNER))
        self.fc2 = nn.Parameter(torch.empty(E, INNER, D))

    def forward(self, x: Tensor, sizes: Tensor) -> Tensor:
        out = x.new_zeros(x.shape)
        ends = torch.cumsum(sizes, 0)
        for e, end in enumerate(ends):
            rows = slice(end - sizes[e], end)
            left, right = (x[rows] @ self.fc1[e]).chunk(2, -1)
            out[rows] = (F.silu(left) * right) @ self.fc2[e]
        return out


class AriaMoE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(D, E, bias=False)
        self.experts = GroupedExperts()

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, D)
        top, ids = self.router(flat).topk(K, dim=1)
        scores = top.softmax(-1)
        sizes = torch.histc(ids.flatten().float(), bins=E, min=0, max=E - 1).long()
        order = ids.view(-1).argsort()
        done = self.experts(flat.index_select(0, order // K), sizes)
        back = torch.zeros_like(done).index_copy_(0, order, done).view(-1, K, D)
        return (back * scores.unsqueeze(-1)).sum(1).view(x.shape)


class DbrxGLU(nn.Module):
    """All experts in flat matrices [E F, D]."""

    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(E * INNER, D))
        self.w2 = nn.Parameter(torch.empty(E * INNER, D))

    def forward(self, x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        return F.silu(x @ w1.t()) @ w2


class DbrxExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.moe_num_experts = E
        self.mlp = DbrxGLU()

    def forward(self, x: Tensor, probs: Tensor, top: Tensor, ids: Tensor) -> Tensor:
        flat = x.view(-1, D)
        out = torch.zeros_like(flat)
        mask = F.one_hot(ids, num_classes=E).permute(2, 1, 0)
        w1, w2 = (w.view(E, INNER, D) for w in (self.mlp.w1, self.mlp.w2))
        for e in range(E):
            slot, token = torch.where(mask[e])
            out.index_add_(0, token, self.mlp(flat[token], w1[e], w2[e]) * top[token, slot, None])
        return out.view(x.shape)


class DbrxRouter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.moe_num_experts = E
        self.layer = nn.Linear(D, E, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        probs = self.layer(x.view(-1, D)).softmax(-1, dtype=torch.float32)
        top, ids = probs.topk(K, dim=-1)
        return probs, top / top.norm(p=1, dim=-1, keepdim=True), ids


class DbrxFFN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = DbrxRouter(), DbrxExperts()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        probs, top, ids = self.router(x)
        return self.experts(x, probs, top, ids), probs


class DenseScores(nn.Module):
    """gpt_oss, llama4 of transformers 4: scores scattered to [T, E], all experts on all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(D, E)
        self.expert_in = nn.Parameter(torch.empty(E, D, INNER))
        self.expert_out = nn.Parameter(torch.empty(E, INNER, D))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        top, ids = self.router(flat).topk(K, dim=-1)
        gates = top.softmax(1)
        scores = gates.new_zeros(len(flat), E).scatter_(1, ids, gates)
        y = torch.bmm(torch.bmm(flat.expand(E, -1, -1), self.expert_in).relu(), self.expert_out)
        return (y * scores.t().unsqueeze(-1)).sum(0).view(x.shape)


class InputWeighted(DenseScores):
    """llama4: the score multiplies what an expert is given."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        logits = self.router(flat)
        top, ids = logits.topk(K, dim=-1)
        scores = torch.full_like(logits, -torch.inf).scatter_(1, ids, top).sigmoid()
        given = flat.repeat(E, 1) * scores.transpose(0, 1).reshape(-1, 1)
        y = torch.bmm(given.view(E, -1, D), self.expert_in).relu()
        return torch.bmm(y, self.expert_out).sum(0).view(x.shape)


class Noisy(nn.Module):
    """A tutorial's: noise on the logits when training, -inf and softmax for dense gates."""

    def __init__(self) -> None:
        super().__init__()
        self.topk_linear, self.noise_linear = nn.Linear(D, E), nn.Linear(D, E)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.topk_linear(x)
        if self.training:
            logits = logits + torch.randn_like(logits) * F.softplus(self.noise_linear(x))
        top, ids = logits.topk(K, dim=-1)
        sparse = torch.full_like(logits, float("-inf")).scatter(-1, ids, top)
        return sparse.softmax(-1), ids


class TutorialMoE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = Noisy()
        self.experts = nn.ModuleList(_mlp() for _ in range(E))

    def forward(self, x: Tensor) -> Tensor:
        gates, ids = self.router(x)
        out, flat, flat_gates = torch.zeros_like(x), x.view(-1, D), gates.view(-1, E)
        for e, expert in enumerate(self.experts):
            mask = (ids == e).any(dim=-1)
            if mask.any():
                rows = mask.view(-1)
                out[mask] += expert(flat[rows]) * flat_gates[rows, e].unsqueeze(1)
        return out


class EveryExpert(nn.Module):
    """Dense gates [T, E]; every expert runs on all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.wg = nn.Linear(D, E, bias=False)
        self.ff = nn.ModuleList(_mlp() for _ in range(E))

    def forward(self, x: Tensor) -> Tensor:
        top, ids = self.wg(x).topk(K, dim=-1)
        w = torch.zeros(*x.shape[:-1], E).scatter(-1, ids, top.softmax(-1))
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.ff):
            out = out + w[..., e, None] * expert(x)
        return out


class ExpertsFirst(nn.Module):
    """All experts on all tokens before anything is routed."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(D, E)
        self.experts = nn.ModuleList(_mlp() for _ in range(E))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.stack([expert(x) for expert in self.experts], -2)
        weights, ids = self.gate(x).topk(K, dim=-1)
        weights = weights.softmax(-1)
        picked = y.gather(-2, ids.unsqueeze(-1).expand(*ids.shape, D))
        return (picked * weights.unsqueeze(-1)).sum(-2)


class Top1(nn.Module):
    """argmax, the probability as weight; rows picked by a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.switch = nn.Linear(D, E)
        self.experts = nn.ModuleDict({f"expert_{e}": _mlp() for e in range(E)})

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        probs = self.switch(flat).softmax(-1)
        ids = probs.argmax(-1)
        out, gate = torch.zeros_like(flat), probs.gather(1, ids[:, None]).squeeze(1)
        for e, expert in enumerate(self.experts.values()):
            if len(here := (ids == e).nonzero().squeeze(1)):
                out[here] = gate[here, None] * expert(flat[here])
        return out.view(x.shape)


class Unweighted(Top1):
    """argmax alone: an expert's output is taken as it is."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        ids = self.switch(flat).argmax(-1)
        out = flat.clone()
        for e, expert in enumerate(self.experts.values()):
            out[ids == e] += expert(flat[ids == e])
        return out.view(x.shape)


class HashTable(nn.Module):
    """Experts looked up by token id; no gate at all."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randint(0, E, (64,)))
        self.experts = nn.ModuleList(_mlp() for _ in range(E))

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        ids = self.table[tokens]
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            out[ids == e] = expert(x[ids == e])
        return out


class RawGate(nn.Module):
    """A bare matrix as gate, `w_gate`; one softmax over the kept; a shared projection after."""

    def __init__(self) -> None:
        super().__init__()
        self.w_gate = nn.Parameter(torch.empty(D, E))
        self.mlps = nn.ModuleList(_mlp() for _ in range(E))
        self.moe_out = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        top, order = (flat @ self.w_gate).sort(dim=1, descending=True)
        ids, weights = order[:, :K], top[:, :K].softmax(1)
        out = torch.zeros_like(flat)
        for slot in range(K):
            for e in range(E):
                rows = ids[:, slot] == e
                if rows.any():
                    out[rows] += weights[rows, slot, None] * self.mlps[e](flat[rows])
        return self.moe_out(out).view(x.shape)


ROUTING = {
    "softmax_topk": SoftmaxTopk,
    "unnormalised": Unnormalised,
    "in_place": InPlace,
    "sparsemixer": SparseMixer,
    "deepseek": DeepSeek,
    "sorted": SortedMoE,
    "aria": AriaMoE,
    "dbrx": DbrxFFN,
    "dense_scores": DenseScores,
    "input_weighted": InputWeighted,
    "noisy_tutorial": TutorialMoE,
    "every_expert": EveryExpert,
    "experts_first": ExpertsFirst,
    "top1": Top1,
    "unweighted": Unweighted,
    "raw_gate": RawGate,
}


class Model(nn.Module):
    """Blocks of one kind behind an embedding."""

    def __init__(self, *blocks: nn.Module, vocab: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, D)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            y = block(x.clone(), input_ids) if isinstance(block, HashTable) else block(x.clone())
            x = x + (y[0] if isinstance(y, tuple) else y)
        return x


def build(kind: type[nn.Module] | str, blocks: int = 2, seed: int = 0) -> Model:
    """A model of such blocks, its weights wide enough that routing is not uniform."""
    torch.manual_seed(seed)
    model = Model(*((ROUTING[kind] if isinstance(kind, str) else kind)() for _ in range(blocks)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.5)
    return model.eval()
