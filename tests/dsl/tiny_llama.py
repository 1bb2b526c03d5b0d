"""The structure of `zoo("tiny-llama")`, written by hand: the language is tested without torch."""

from effc.dsl.checker.skeleton import Branch, Group, Member, Part, Skeleton

LAYERS, HIDDEN, WIDTH, HEADS, KV, DIM = 8, 128, 384, 8, 4, 16


def _linear(path: str, out: int, inp: int) -> Part:
    return Part(path, "Linear", (("weight", (out, inp)),))


def _layer(at: str) -> tuple[list[Part], list[Branch], list[Group]]:
    attn, mlp = f"{at}.self_attn", f"{at}.mlp"
    norms = [
        Part(f"{at}.{n}", "LlamaRMSNorm", (("weight", (HIDDEN,)),))
        for n in ("input_layernorm", "post_attention_layernorm")
    ]
    parts = [
        _linear(f"{attn}.q_proj", HEADS * DIM, HIDDEN),
        _linear(f"{attn}.k_proj", KV * DIM, HIDDEN),
        _linear(f"{attn}.v_proj", KV * DIM, HIDDEN),
        _linear(f"{attn}.o_proj", HIDDEN, HEADS * DIM),
        _linear(f"{mlp}.gate_proj", WIDTH, HIDDEN),
        _linear(f"{mlp}.up_proj", WIDTH, HIDDEN),
        _linear(f"{mlp}.down_proj", HIDDEN, WIDTH),
        *norms,
    ]
    rows, block = ((0, 1),), ((0, DIM),)
    q = Member(f"{attn}.q_proj.weight", 0, block), Member(f"{attn}.o_proj.weight", 1, block)
    served = ((0, DIM * HEADS // KV),)
    kv = (
        Member(f"{attn}.q_proj.weight", 0, served),
        Member(f"{attn}.k_proj.weight", 0, block),
        Member(f"{attn}.v_proj.weight", 0, block),
        Member(f"{attn}.o_proj.weight", 1, served),
    )
    axes = {"gate": 0, "up": 0, "down": 1}
    wide = tuple(Member(f"{mlp}.{name}_proj.weight", axis, rows) for name, axis in axes.items())
    groups = [
        Group(attn, "heads", HEADS, q, per_block=HEADS // KV),
        Group(attn, "kv_heads", KV, kv),
        Group(mlp, "channels", WIDTH, wide),
    ]
    branches = [
        Branch(attn, at, "attention", (attn, f"{at}.input_layernorm"), "add"),
        Branch(mlp, at, "mlp", (mlp, f"{at}.post_attention_layernorm"), "add_1"),
    ]
    return parts, branches, groups


def skeleton() -> Skeleton:
    units = tuple(f"model.layers.{i}" for i in range(LAYERS))
    layers = [_layer(u) for u in units]
    parts = [
        Part("model.embed_tokens", "Embedding", (("weight", (2048, HIDDEN)),)),
        *(p for parts, _, _ in layers for p in parts),
        Part("model.norm", "LlamaRMSNorm", (("weight", (HIDDEN,)),)),
        _linear("lm_head", 2048, HIDDEN),
    ]
    return Skeleton(
        "llama",
        tuple(parts),
        units,
        tuple(b for _, bs, _ in layers for b in bs),
        tuple(g for _, _, gs in layers for g in gs),
        (("model.embed_tokens.weight", "lm_head.weight"),),
        facts={"hidden": HIDDEN, "vocab": 2048},
    )


def headless() -> Skeleton:
    """A model without attention, as far as the checker looks at it."""
    units = tuple(f"backbone.layers.{i}" for i in range(4))
    return Skeleton(
        "mamba",
        tuple(_linear(f"{u}.mixer.in_proj", 256, 64) for u in units),
        units,
        tuple(Branch(f"{u}.mixer", u, "ssm", (f"{u}.mixer",), "add") for u in units),
    )


def of(model) -> Skeleton | None:
    """As `check` asks for skeletons: of `zoo("tiny-llama")` and `config("mamba.json")` only."""
    if model.word == "zoo" and model.args["name"] == "tiny-llama":
        return skeleton()
    return headless() if model.word == "config" and model.args["path"] == "mamba.json" else None
