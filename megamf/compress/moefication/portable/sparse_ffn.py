"""Feed-forward layers split into experts of neurons, a few of which are computed for a token. Plain torch.

Shapes: N tokens, D input width, E experts, F neurons of one expert, K chosen experts, O output width.
With all experts chosen the layer equals the dense one it was made from.
Source: MoEfication (arXiv 2110.01786): FFN(x) = W2 act(W1 x), neurons of experts that are not chosen count as zero.
"""

import torch
import torch.nn.functional as F
from torch import nn

ACTIVATIONS = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "relu2": lambda x: F.relu(x).square(),
}

ROUTERS = ("truth", "similarity", "mlp")

# Where the parts of a feed-forward layer stand below the module that holds them. `gate` is what is activated, `up`
# (gated units) what it is multiplied with. `whole`: the holder computes nothing else, so that it is replaced; elsewhere
# the first projection is replaced, and the activation and the last projection do nothing any more.
FORMS = {
    "Llama, Mistral, Qwen, Gemma": {
        "gate": "gate_proj", "up": "up_proj", "act": "act_fn", "out": "down_proj", "whole": True,
    },
    "T5 gated": {"gate": "wi_0", "up": "wi_1", "act": "act", "out": "wo", "whole": True},
    "T5": {"gate": "wi", "up": None, "act": "act", "out": "wo", "whole": True},
    "GPT-NeoX": {"gate": "dense_h_to_4h", "up": None, "act": "act", "out": "dense_4h_to_h", "whole": True},
    "GPT-2": {"gate": "c_fc", "up": None, "act": "act", "out": "c_proj", "whole": True},
    "OPT, BART": {"gate": "fc1", "up": None, "act": "activation_fn", "out": "fc2", "whole": False},
    "megamf dense": {"gate": "fc1", "up": None, "act": "activation", "out": "fc2", "whole": False},
    "BERT, RoBERTa": {
        "gate": "intermediate.dense", "up": None, "act": "intermediate.intermediate_act_fn", "out": "output.dense",
        "whole": False,
    },
}  # fmt: skip


class Passing(nn.Module):
    """Takes the place of a part whose work the sparse layer has done already."""

    def forward(self, x):
        return x


def part(module, path):
    """The attribute at a dotted path below a module, or None."""
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


def put(module, path, value):
    """Set the attribute at a dotted path; a plain function gives way to a module too."""
    *parents, name = path.split(".")
    for parent in parents:
        module = getattr(module, parent)
    if not isinstance(getattr(module, name), nn.Module) and isinstance(value, nn.Module):
        delattr(module, name)
    setattr(module, name, value)


def matrix(projection):
    """The weight of a linear map as [in, out]."""
    weight = projection.weight
    return weight if hasattr(projection, "nf") else weight.t()


def is_linear(module):
    """Whether a module is a plain linear map (torch's, or the transposed one of GPT-2)."""
    return isinstance(module, nn.Linear) or (hasattr(module, "nf") and getattr(module, "weight", None) is not None)


def find_layers(model):
    """[(name of the holder, holder, form)] of every feed-forward layer of a known form, in the model's order."""
    found = []
    for name, module in model.named_modules():
        for form in FORMS.values():
            linear = [form[key] for key in ("gate", "up", "out") if form[key]]
            if all(is_linear(part(module, path)) for path in linear) and callable(part(module, form["act"])):
                found.append((name, module, form))
                break
    return found


def replace(model, name, holder, form, layer):
    """Put a sparse layer in the place of a dense one."""
    if form["whole"]:
        put(model, name, layer)
        return
    put(holder, form["gate"], layer)
    put(holder, form["act"], Passing())
    put(holder, form["out"], Passing())


def install(model, settings):
    """Replace every dense feed-forward layer by an empty sparse one, to be filled from a state dict."""
    for name, holder, form in find_layers(model):
        replace(model, name, holder, form, SparseFfn.like(holder, form, settings))


class SparseFfn(nn.Module):
    """y = b2 + sum over the chosen experts e of W2_e (act(W1_e x + b1_e) * (U_e x + c_e)); U only in gated units.

    Scores of the experts: `truth`, the sum of |activation| of their neurons (computes everything: an upper bound);
    `similarity`, minus the distance of x / |x| to the mean of the experts' normalised rows of W1; `mlp`,
    A tanh(B x / |x|). With `weighted`, an expert's output is multiplied by the ratio of its score to the best one's:
    of the sums for `truth`, of the sigmoids for `mlp`, of exp(score) for `similarity`.
    """

    def __init__(self, shape, num_selected, router, activation, weighted=False, up=False, biases=()):
        """shape: (E, D, F, O). biases: which of `gate`, `up` and `out` there are."""
        super().__init__()
        E, D, size, O = shape
        self.num_experts, self.num_selected = E, num_selected
        self.router_kind, self.activation_name, self.weighted = router, activation, weighted
        self.gate_EDF = nn.Parameter(torch.empty(E, D, size))
        self.up_EDF = nn.Parameter(torch.empty(E, D, size)) if up else None
        self.out_EFO = nn.Parameter(torch.empty(E, size, O))
        self.gate_bias_EF = nn.Parameter(torch.empty(E, size)) if "gate" in biases else None
        self.up_bias_EF = nn.Parameter(torch.empty(E, size)) if "up" in biases else None
        self.out_bias_O = nn.Parameter(torch.empty(O)) if "out" in biases else None
        self.centre_ED = nn.Parameter(torch.empty(E, D)) if router == "similarity" else None
        self.router = None
        if router == "mlp":
            self.router = nn.Sequential(nn.Linear(D, E, bias=False), nn.Tanh(), nn.Linear(E, E, bias=False))
        # (layer, x_ND, expert_NK, weight_NK or None) -> y_NO, where there is something faster than `by_expert`.
        self.kernel = None

    @classmethod
    def like(cls, holder, form, settings):
        """An empty sparse layer with the sizes, dtype and device of a dense one; settings: of the whole model."""
        gate, up, out = (part(holder, form[key]) if form[key] else None for key in ("gate", "up", "out"))
        named = {"gate": gate, "up": up, "out": out}
        biases = [key for key, value in named.items() if getattr(value, "bias", None) is not None]
        layer = cls.of_sizes(*matrix(gate).shape, matrix(out).shape[1], up is not None, biases, settings)
        return layer.to(device=gate.weight.device, dtype=gate.weight.dtype)

    @classmethod
    def of_sizes(cls, D, hidden, O, up, biases, settings):
        """An empty sparse layer in the place of `hidden` neurons from D to O."""
        size = settings["expert_size"]
        if hidden % size:
            raise ValueError(f"{hidden} neurons cannot be shared out to experts of {size}")
        shape = (hidden // size, D, size, O)
        return cls(
            shape,
            settings["num_selected"],
            settings["router"],
            settings["activation"],
            settings["weighted"],
            up,
            biases,
        )

    def activation(self, x):
        return ACTIVATIONS[self.activation_name](x)

    def hidden(self, x_ND):
        """Activations of all neurons, h_NEF."""
        h_NEF = torch.einsum("nd,edf->nef", x_ND, self.gate_EDF)
        h_NEF = self.activation(h_NEF if self.gate_bias_EF is None else h_NEF + self.gate_bias_EF)
        if self.up_EDF is None:
            return h_NEF
        u_NEF = torch.einsum("nd,edf->nef", x_ND, self.up_EDF)
        return h_NEF * (u_NEF if self.up_bias_EF is None else u_NEF + self.up_bias_EF)

    def scores(self, x_ND, h_NEF=None):
        """score_NE, float32 or float64."""
        x_ND = x_ND.float() if x_ND.dtype in (torch.bfloat16, torch.float16) else x_ND
        if self.router_kind == "truth":
            h_NEF = self.hidden(x_ND.to(self.gate_EDF.dtype)) if h_NEF is None else h_NEF
            return h_NEF.abs().sum(-1, dtype=x_ND.dtype)
        x_ND = F.normalize(x_ND, dim=-1)
        if self.router_kind == "similarity":
            centre_ED = self.centre_ED.to(x_ND.dtype)
            # |x - c|^2 without a difference of every pair; x has length 1.
            square_NE = 1 - 2 * x_ND @ centre_ED.t() + centre_ED.square().sum(-1)
            return -square_NE.clamp(min=0).sqrt()
        first, _, last = self.router
        return F.linear(torch.tanh(F.linear(x_ND, first.weight.to(x_ND.dtype))), last.weight.to(x_ND.dtype))

    def choose(self, score_NE):
        """expert_NK and, where experts are weighted, weight_NK."""
        best_NK, expert_NK = score_NE.topk(self.num_selected, dim=-1)
        if not self.weighted:
            return expert_NK, None
        if self.router_kind == "truth":
            return expert_NK, best_NK / best_NK[:, :1].clamp(min=torch.finfo(best_NK.dtype).tiny)
        if self.router_kind == "mlp":
            return expert_NK, best_NK.sigmoid() / best_NK[:, :1].sigmoid()
        return expert_NK, (best_NK - best_NK[:, :1]).exp()

    def forward(self, x):
        """x [..., D] -> y [..., O]."""
        x_ND = x.reshape(-1, x.shape[-1])
        everything = self.num_selected == self.num_experts and not self.weighted
        if everything or self.router_kind == "truth" or (torch.is_grad_enabled() and self.learns(x)):
            y_NO = self.by_mask(x_ND, everything)
        else:
            expert_NK, weight_NK = self.choose(self.scores(x_ND))
            y_NO = (self.kernel or SparseFfn.by_expert)(self, x_ND, expert_NK, weight_NK)
        return y_NO.reshape(*x.shape[:-1], -1)

    def learns(self, x):
        return x.requires_grad or any(parameter.requires_grad for parameter in self.parameters())

    def by_mask(self, x_ND, everything=False):
        """The definition: all neurons are computed, those of other experts set to zero."""
        h_NEF = self.hidden(x_ND)
        if not everything:
            expert_NK, weight_NK = self.choose(self.scores(x_ND, h_NEF).detach())
            weight_NE = torch.zeros(h_NEF.shape[:2], dtype=h_NEF.dtype, device=h_NEF.device)
            value = torch.ones_like(expert_NK, dtype=h_NEF.dtype) if weight_NK is None else weight_NK.to(h_NEF.dtype)
            h_NEF = h_NEF * weight_NE.scatter(1, expert_NK, value).unsqueeze(-1)
        y_NO = torch.einsum("nef,efo->no", h_NEF, self.out_EFO)
        return y_NO if self.out_bias_O is None else y_NO + self.out_bias_O

    def by_expert(self, x_ND, expert_NK, weight_NK):
        """The same, computing the chosen experts only: expert by expert, each for the tokens that chose it."""
        order = expert_NK.flatten().argsort(stable=True)
        counts = expert_NK.flatten().bincount(minlength=self.num_experts).tolist()
        y_NO = torch.zeros(x_ND.shape[0], self.out_EFO.shape[2], dtype=x_ND.dtype, device=x_ND.device)
        for e, rows in enumerate(order.split(counts)):
            if not len(rows):
                continue
            n = rows // expert_NK.shape[1]
            x = x_ND[n]
            h = x @ self.gate_EDF[e]
            h = self.activation(h if self.gate_bias_EF is None else h + self.gate_bias_EF[e])
            if self.up_EDF is not None:
                u = x @ self.up_EDF[e]
                h = h * (u if self.up_bias_EF is None else u + self.up_bias_EF[e])
            if weight_NK is not None:
                h = h * weight_NK.flatten()[rows].to(h.dtype).unsqueeze(-1)
            y_NO.index_add_(0, n, h @ self.out_EFO[e])
        return y_NO if self.out_bias_O is None else y_NO + self.out_bias_O
