"""Q–K=V in a model you already have: key and value of a rotary transformers model become one tensor.

    python share_kv.py --model HuggingFaceTB/SmolLM2-135M-Instruct --text prose/ --output_dir OUT

In each KV head the cached numbers are s, unrotated: the key is s after the model's own norm (where it has one) and
rotation, the value is s. `v_proj` equals `k_proj`, and the model stays an ordinary LlamaForCausalLM, Qwen3ForCausalLM,
and so on. `SharedKVCache(model)` keeps s alone, half of the bytes of a DynamicCache. Three stages, each measured with
--eval_text:

1. Closed form: s = M [k; v] with k ~ s and v ~ B s, by alternating least squares in a metric from the gradients of the
   loss; B goes into `o_proj`. Exact where values are a linear map of the keys.
2. Fit (--fit_epochs): layer by layer, the shared attention (q, k, o) is fitted on the inputs that the layers converted
   before it give, so that the residual stream comes back to the original's.
3. Training (--train_tokens): the attention of all layers, end to end, towards the original's own predictions.

Memory: the original's weights, the attention once more in fp32 (with its gradients and Adam's moments for one layer in
the fit, for all in training), and in main memory three times the hidden states of the calibration text, in the model's
dtype: 1.6 GB for 65,536 tokens of width 4,096 in bf16. One device. Interrupted, the same command goes on from the last
layer, in training from at most ten minutes before.

To train a converted model further, keep the two projections one: set `a.v_proj = a.k_proj` in each shared layer, and
`a.v_proj = copy.deepcopy(a.k_proj)` before saving; or train other weights alone, as LoRA on q_proj and o_proj does.
"""

import argparse
import copy
import hashlib
import inspect
import json
import math
import os
import random
import shutil
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.cache_utils import DynamicLayer

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma3_text")  # those the tests convert
ROW = 1024  # tokens of a row of calibration text
MOMENT_TOKENS = 32768  # of the calibration text, for the closed form
FLOOR = 0.1  # of the gradients' mean square, added to their metric so that directions without a gradient count too
FIT_RATE = 0.01  # learning rate of the fit, in units of a weight's root mean square
TRAIN_RATE = 3e-4  # the same for training end to end


# -- The cache ---------------------------------------------------------------------------------------------------------


class RotaryWatch:
    """Sees the cosines and sines of each forward pass; one for a model, however many caches it has."""

    def __init__(self, rotary):
        self.latest = None
        rotary.register_forward_hook(self.see, with_kwargs=True)

    def see(self, module, args, kwargs, output):
        kind = kwargs.get("layer_type", args[2] if len(args) > 2 else "full_attention")  # Gemma 3: a call for each kind
        if kind == "full_attention":
            self.latest = output

    def __deepcopy__(self, memo):
        return self  # a copied cache belongs to the same model


class SharedLayer(DynamicLayer):
    """Keeps s alone, as its values [B, KV heads, positions, head_dim]; its keys have no width.

    The values are the beginning of a tensor with room for more positions, to which new ones are written in place.
    """

    SPARE = 256  # positions allocated in advance

    def __init__(self, owner, attention):
        super().__init__()
        self.owner = owner
        self.norm = getattr(attention, "k_norm", None)
        self.rotates = bool(getattr(attention, "use_rope", True))  # SmolLM3 has layers without rotation

    def get_seq_length(self):
        return self.values.shape[-2] if self.is_initialized and self.values.numel() else 0

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        batch, heads, new, width = value_states.shape
        past = self.get_seq_length()
        length = past + new
        if not past or length > self.values.stride(1) // width:
            with torch.inference_mode(False):  # so that it can be written to in and out of inference mode
                room = value_states.new_empty(batch, heads, length + self.SPARE, width)
            if past:
                room[:, :, :past] = self.values
            self.values = room
        self.values = s = self.values.as_strided((batch, heads, length, width), self.values.stride())
        s[:, :, past:] = value_states.detach()
        self.keys = s[..., :0]
        cos, sin = self.owner.positions_up_to(length, s)
        if not past:
            return key_states, s
        if not self.rotates:
            return s, s
        keys = self.owner.room_for_keys(s)
        rotate(s[:, :, :past], cos, sin, self.norm, out=keys[:, :, :past])
        keys[:, :, past:] = key_states.detach()
        return keys, s


class SharedKVCache(DynamicCache):
    """A transformers cache for a model whose keys and values are shared; layers that are not keep both.

    Pass it to `forward` or `generate` as `cache` (transformers 5.24) or `past_key_values`. What is kept is s; keys are
    made on each read, in one buffer that all layers use in turn. One more layer, after the model's own, keeps the
    positions' cosines and sines. For inference: no gradient flows through it. Not for torch.compile, and not for two
    threads with one model.
    """

    def __init__(self, model):
        super().__init__(config=model.config)
        decoder = model.get_decoder()
        for i, layer in enumerate(decoder.layers):
            if type(self.layers[i]) is DynamicLayer and is_shared(layer.self_attn):
                self.layers[i] = SharedLayer(self, layer.self_attn)
        if not any(isinstance(layer, SharedLayer) for layer in self.layers):
            raise ValueError("no layer of this model has k_proj equal to v_proj (share_kv.py makes a model that has)")
        if not hasattr(decoder.rotary_emb, "shared_kv_watch"):
            decoder.rotary_emb.shared_kv_watch = RotaryWatch(decoder.rotary_emb)
        self.watch, self.positions, self.buffer = decoder.rotary_emb.shared_kv_watch, DynamicLayer(), None
        self.layers.append(self.positions)  # so that it is cropped, reordered and copied with the others

    @property
    def nbytes(self):
        """Bytes of the keys and values kept for the positions seen."""
        return sum(x.nbytes for layer in self.layers[:-1] if layer.is_initialized for x in (layer.keys, layer.values))

    def positions_up_to(self, length, s):
        """Cosines and sines, [B, 1, length, head_dim]; the first shared layer of a pass adds the new tokens'."""
        if self.positions.get_seq_length() < length:
            new = (x.detach().unsqueeze(1).expand(len(s), -1, -1, -1) for x in self.watch.latest)
            self.positions.update(*new)
        return self.positions.keys.to(s.device), self.positions.values.to(s.device)

    def room_for_keys(self, s):
        """A contiguous tensor of the shape of s."""
        x = self.buffer
        if x is None or x.numel() < s.numel() or x.dtype != s.dtype or x.device != s.device:
            with torch.inference_mode(False):
                self.buffer = s.new_empty(s.numel() + s.numel() // s.shape[-2] * SharedLayer.SPARE)
        return self.buffer[: s.numel()].view(s.shape)


@torch.no_grad()
def rotate(s, cos, sin, norm, out):
    """The keys of s [B, KV heads, S, head_dim], on a CPU in blocks that fit the processor's cache."""
    half, numbers = s.shape[-1] // 2, s.shape[0] * s.shape[1] * s.shape[-1]
    size = s.shape[-2] if s.is_cuda else max(2**20 // numbers, 16)
    for i in range(0, s.shape[-2], size):
        x, keys = s[:, :, i : i + size], out[:, :, i : i + size]
        c, n = (p[:, :, i : i + x.shape[-2]] for p in (cos, sin))
        x = x if norm is None else norm(x)
        torch.mul(x, c, out=keys)
        keys[..., :half] -= x[..., half:] * n[..., :half]  # rounded as in the models: the same keys to the last bit
        keys[..., half:] += x[..., :half] * n[..., half:]


def is_shared(attention):
    """Whether key and value are the same projection (quantised weights are buffers)."""
    k, v = attention.k_proj.state_dict(), attention.v_proj.state_dict()
    return len(k) > 0 and k.keys() == v.keys() and all(torch.equal(k[name], v[name]) for name in k)


def generate(model, **arguments):
    """As `model.generate`, with a SharedKVCache where no cache is given."""
    name = "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"
    if arguments.get(name) is None and arguments.get("use_cache") is not False:
        arguments[name] = SharedKVCache(model)
    return type(model).generate(model, **arguments)


# -- The model and the text --------------------------------------------------------------------------------------------


def load_model(name):
    """(model, tokenizer), or a ValueError that says why the model cannot be shared."""
    config = AutoConfig.from_pretrained(name)
    if config.model_type not in FAMILIES:
        raise ValueError(f"{name} is a {config.model_type} model; those that can be shared: {', '.join(FAMILIES)}")
    if getattr(config, "quantization_config", None):
        raise ValueError(f"{name} holds quantised weights; convert the original and quantise the result")
    if not shareable(config):
        raise ValueError(f"all layers of {name} have a sliding window; only layers that keep every position are shared")
    model = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
    if any(is_shared(layer.self_attn) for layer in model.get_decoder().layers):
        raise ValueError(f"{name} shares key and value already")
    model.to("cuda" if torch.cuda.is_available() else "cpu", None if model.dtype != torch.float16 else torch.float32)
    return model.eval().requires_grad_(False), AutoTokenizer.from_pretrained(name)  # fp16 is too narrow for gradients


def shareable(config):
    """The layers that attend to all positions."""
    return [i for i, layer in enumerate(DynamicCache(config=config).layers) if type(layer) is DynamicLayer]


def read_documents(paths, seed=0):
    """Documents of plain text files, of .jsonl files with a field "text", and of folders of both, shuffled by file."""
    files = []
    for path in map(Path, paths):
        if not path.exists():
            raise ValueError(f"{path}: no such file or folder")
        inside = (p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
        files += sorted(inside) if path.is_dir() else [path]
    random.Random(seed).shuffle(files)
    for path in files:
        try:
            with open(path, encoding="utf-8") as f:
                if path.suffix == ".jsonl":
                    yield from (json.loads(line)["text"] for line in f)
                else:
                    yield from iter(lambda: f.read(2**20), "")  # a longer file is several documents
        except (ValueError, KeyError, TypeError) as e:
            wanted = 'plain text in UTF-8, or .jsonl with a field "text"'
            raise ValueError(f"{path}: expected {wanted} ({type(e).__name__}: {e})") from None


def read_rows(paths, tokenizer, count, length=ROW, most=0, seed=0):
    """int64 [N, length]: `count` rows, or as many as there are up to `most`, drawn from the first four times as many.

    The documents are joined; each row is the next stretch, after a begin-of-text token if the tokenizer adds one.
    """
    tokens, end, first = [], [tokenizer.eos_token_id], tokenizer("a")["input_ids"][0]
    begin = [first] if first == tokenizer.bos_token_id else []
    take = length - len(begin)
    for document in read_documents(paths, seed):
        tokens += tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        tokens += end if end != [None] else []
        if len(tokens) > 4 * max(count, most) * length:
            break
    rows = torch.tensor(tokens[: len(tokens) // take * take]).view(-1, take)
    rows = torch.cat([torch.tensor(begin, dtype=torch.long).expand(len(rows), -1), rows], 1)
    if len(rows) < count:
        raise ValueError(f"the text holds {len(tokens):,} tokens, {count * length:,} are asked for")
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[: max(count, most)]]


def precision(model, fast):
    """bf16 autocast where the model is in bf16, and for fits (`fast`) where the processor is quick at it."""
    quick = model.device.type == "cuda" or torch.cpu._is_avx512_bf16_supported()
    return torch.autocast(model.device.type, torch.bfloat16, enabled=model.dtype == torch.bfloat16 or (fast and quick))


@torch.no_grad()
def row_losses(model, rows):
    """Mean loss in nats of each row, float64 [N]."""
    losses = []
    with precision(model, fast=False):
        for row in rows.to(model.device).split(1):
            logits = model(row, use_cache=False).logits[0, :-1].float()
            losses.append(F.cross_entropy(logits, row[0, 1:]).double().cpu())
    return torch.stack(losses)


# -- The closed form ---------------------------------------------------------------------------------------------------


def second_moments(model, rows):
    """C = E[x xT] and G = E[g gT] of x = [k; v] in each layer and KV head, float64 [L, KV heads, 2 hd, 2 hd].

    k and v are the outputs of the projections, before norm and rotation; g is the gradient of the rows' summed loss.
    """
    pairs = [(layer.self_attn.k_proj, layer.self_attn.v_proj) for layer in model.get_decoder().layers]
    g, hd, kept = model.config.num_key_value_heads, model.get_decoder().layers[0].self_attn.head_dim, {}
    C = torch.zeros(len(pairs), g, 2 * hd, 2 * hd, dtype=torch.float64, device=model.device)
    G = torch.zeros_like(C)

    def keep(module, inputs, output):
        output.retain_grad()
        kept[module] = output

    hooks = [module.register_forward_hook(keep) for pair in pairs for module in pair]
    for row in tqdm(rows.to(model.device).split(1), "second moments", unit="row"):
        embedded = model.get_input_embeddings()(row).requires_grad_()
        with precision(model, fast=False):
            logits = model(inputs_embeds=embedded, use_cache=False).logits
        F.cross_entropy(logits[0, :-1].float(), row[0, 1:], reduction="sum").backward()
        for i, pair in enumerate(pairs):
            for total, parts in ((C, [kept[m].detach() for m in pair]), (G, [kept[m].grad for m in pair])):
                x = torch.cat([part.view(-1, g, hd) for part in parts], -1).double()
                total[i] += torch.einsum("tgd,tge->gde", x, x)
    for hook in hooks:
        hook.remove()
    return C.cpu() / rows.numel(), G.cpu() / rows.numel()


def solve(C, G, floor=FLOOR, iterations=60):
    """(M [hd, 2 hd], B [hd, hd], price) of one KV head: s = M [k; v] with k ~ s and v ~ B s in the metric G.

    The price is the mean square of what the loss's gradient makes of the errors; it tells cheap layers from dear ones.
    """
    hd = len(C) // 2
    metric = G + floor * torch.diag(torch.cat([d.mean().expand(hd) for d in torch.diag(G).split(hd)]))
    eye = torch.eye(hd, dtype=C.dtype)
    M = torch.cat([eye, torch.zeros_like(eye)], 1)
    for _ in range(iterations):
        S, X = M @ C @ M.T, C @ M.T
        correction = torch.linalg.solve(metric[hd:, hd:], metric[hd:, :hd] @ (X[:hd] - S))
        B = (X[hd:] + correction) @ torch.linalg.inv(S + 1e-10 * S.trace() / hd * eye)
        W = torch.cat([eye, B])
        M = torch.linalg.solve(W.T @ metric @ W + 1e-10 * metric.trace() / hd * eye, W.T @ metric)
    rest = torch.eye(2 * hd, dtype=C.dtype) - W @ M
    return M, B, float(torch.trace(G @ rest @ C @ rest.T))


def share_attention(attention, solutions):
    """Put s into k_proj, the same module into v_proj, and each KV head's B into o_proj."""
    hd, g = attention.head_dim, len(solutions)
    k, v, o = attention.k_proj, attention.v_proj, attention.o_proj
    out = o.weight.double().view(-1, g, o.weight.shape[1] // hd // g, hd)
    for j, (M, B, _) in enumerate(solutions):
        M, B = M.to(out.device), B.to(out.device)
        for x, y in zip(k.parameters(), v.parameters(), strict=True):  # weights and, where there are any, biases
            part = slice(j * hd, (j + 1) * hd)
            x.data[part] = (M[:, :hd] @ x.data[part].double() + M[:, hd:] @ y.data[part].double()).to(x.dtype)
        out[:, j] = out[:, j] @ B
    attention.v_proj = k
    o.weight.data = out.reshape(o.weight.shape).to(o.weight.dtype)


def make_student(original):
    """A model with attention weights of its own, in fp32; all others are the original's."""
    own = {id(p) for layer in original.get_decoder().layers for p in layer.self_attn.parameters()}
    memo = {id(p): p for p in original.parameters() if id(p) not in own}
    student = copy.deepcopy(original, memo)
    for layer in student.get_decoder().layers:
        layer.self_attn.float().requires_grad_()
    return student


# -- Fit and training --------------------------------------------------------------------------------------------------


def optimizer_for(layers, rate, betas):
    """Adam on the layers' attention, with a learning rate for each tensor in units of its root mean square."""
    parameters = [p for layer in layers for p in layer.self_attn.parameters()]
    groups = [{"params": [p], "scale": rate * max(p.detach().pow(2).mean().sqrt().item(), 1e-3)} for p in parameters]
    return torch.optim.Adam(groups, lr=0.0, betas=betas)


def step(optimizer, progress):
    """A step on a cosine from the full rate to nothing, after a twentieth of warm-up."""
    rate = min(1.0, progress / 0.05) * (1 + math.cos(math.pi * progress)) / 2
    for group in optimizer.param_groups:
        group["lr"] = group["scale"] * rate
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()
    optimizer.zero_grad()


def layer_arguments(model, row):
    """What each layer is called with beside the hidden states, for any row of this length."""
    arguments, hooks = [], []
    for layer in model.get_decoder().layers:
        keep = lambda module, args, kwargs: arguments.append(kwargs)  # noqa: E731
        hooks.append(layer.register_forward_pre_hook(keep, with_kwargs=True))
    with torch.no_grad():
        model(row.to(model.device), use_cache=False)
    for hook in hooks:
        hook.remove()
    return arguments


def attend(layer, states, arguments):
    """What attention adds to the residual stream."""
    y = layer.self_attn(hidden_states=layer.input_layernorm(states), **arguments)[0]
    return layer.post_attention_layernorm(y) if hasattr(layer, "pre_feedforward_layernorm") else y  # Gemma 3 norms it


def fit_layers(original, student, rows, shared, epochs, folder, rate=FIT_RATE):
    """Fit the attention of the `shared` layers, in order, on the inputs that the layers before them give.

    The target is what would bring the residual stream back to the original's. `folder` keeps each fitted layer, and
    what it holds is not fitted again.
    """
    device, arguments = original.device, layer_arguments(original, rows[:1])
    with torch.no_grad():
        before = torch.cat([original.get_input_embeddings()(row.to(device)).cpu() for row in rows.split(1)])
    after, target = before.clone(), torch.empty_like(before)
    row_of = lambda states, n: states[n : n + 1].to(device)  # noqa: E731
    layers = zip(original.get_decoder().layers, student.get_decoder().layers, strict=True)
    for i, (old, new) in enumerate(layers):
        path = folder / f"layer{i:03d}.pt"
        if i in shared and path.exists():
            new.self_attn.load_state_dict(torch.load(path, map_location=device))
        elif i in shared:
            with torch.no_grad(), precision(original, fast=True):
                for n in range(len(rows)):
                    x = row_of(before, n)
                    target[n] = (x + attend(old, x, arguments[i]) - row_of(after, n))[0].cpu()
            power = sum(x.float().pow(2).mean().item() for x in target) / len(rows)
            optimizer, generator = optimizer_for([new], rate, (0.9, 0.98)), torch.Generator().manual_seed(i)
            order = torch.cat([torch.randperm(len(rows), generator=generator) for _ in range(epochs)]).tolist()
            for k, n in enumerate(bar := tqdm(order, f"layer {i}", unit="row", leave=False)):
                with precision(original, fast=True):
                    y = attend(new, row_of(after, n), arguments[i])
                loss = (y.float() - row_of(target, n).float()).pow(2).mean() / power
                loss.backward()
                step(optimizer, (k + 0.5) / len(order))
                bar.set_postfix(error=f"{loss.item():.4f}", refresh=False)
            save(new.self_attn.state_dict(), path)
        with torch.no_grad(), precision(original, fast=True):
            for states, layer in ((before, old), (after, new)):
                for n in range(len(rows)):
                    states[n] = layer(row_of(states, n), **arguments[i])[0].cpu()


def train(original, student, rows, path, rate=TRAIN_RATE, every=600):
    """The attention of all layers, end to end, one row a step: KL divergence from the original's predictions.

    `path` keeps the state, written every `every` seconds and at the end.
    """
    optimizer, start, saved = optimizer_for(student.get_decoder().layers, rate, (0.9, 0.95)), 0, time.monotonic()
    if path.exists():
        state = torch.load(path, map_location=original.device)
        student.load_state_dict(state["model"], strict=False)
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
        del state
    for n in (bar := tqdm(range(start, len(rows)), "training", unit="row", initial=start, total=len(rows))):
        row = rows[n : n + 1].to(original.device)
        with precision(original, fast=True):
            with torch.no_grad():
                wanted = original(row, use_cache=False).logits
            got = student(row, use_cache=False).logits
        wanted, got = (x[0].float().log_softmax(-1) for x in (wanted, got))
        loss = F.kl_div(got, wanted, log_target=True, reduction="sum") / row.numel()
        loss.backward()
        step(optimizer, (n + 0.5) / len(rows))
        bar.set_postfix(kl=f"{loss.item():.4f}", refresh=False)
        if time.monotonic() - saved > every or n + 1 == len(rows):
            weights = {k: v for k, v in student.state_dict().items() if ".self_attn." in k}
            save({"model": weights, "optimizer": optimizer.state_dict(), "step": n + 1}, path)
            saved = time.monotonic()


def save(state, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, f"{path}.partial")
    os.replace(f"{path}.partial", path)


# -- The output --------------------------------------------------------------------------------------------------------

HEAD = '''"""`generate` with a cache that keeps one tensor for key and value (written by share_kv.py)."""

import inspect

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


'''

CARD = """# {name}, key and value shared

Made from {name}, whose licence applies, with share_kv.py. In {shared} of {layers} layers `v_proj` equals `k_proj`: the
value is the key before its norm and rotation. With a cache that keeps one tensor for both, a token takes
{after:,} bytes instead of {before:,} ({share:.0%}) in {dtype}{window}. Text: {tokens:,} tokens (sha256 of the
token ids {digest}), of which {train:,} for training end to end; passes of the fit: {epochs}.

{table}
transformers loads the folder as the {architecture} that it is, without remote code and with a cache of the usual size.
With the smaller cache, where FOLDER is the path of this folder or its id on the hub:

    model.generate(**inputs, custom_generate=FOLDER, trust_remote_code=True)

`SharedKVCache(model)` in `custom_generate/generate.py`, plain Python, can be passed to `forward` too.

To train the model further, keep the two projections one: `a.v_proj = a.k_proj` in each shared layer, and
`a.v_proj = copy.deepcopy(a.k_proj)` before saving; or train other weights alone.
"""


def write_output(original, student, dtype, tokenizer, out, card):
    """The finished folder, under `out`; the student's attention goes into the original."""
    for old, new in zip(original.get_decoder().layers, student.get_decoder().layers, strict=True):
        for name, p in old.self_attn.named_parameters():
            p.data.copy_(new.self_attn.get_parameter(name).data)
    original.to(dtype).save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "custom_generate").mkdir(exist_ok=True)
    parts = (RotaryWatch, SharedLayer, SharedKVCache, rotate, is_shared, generate)
    code = HEAD + "\n\n".join(inspect.getsource(part) for part in parts)
    (out / "custom_generate" / "generate.py").write_text(code, encoding="utf-8")
    (out / "README.md").write_text(card, encoding="utf-8")


def convert(a):
    out, work = Path(a.output_dir), Path(f"{a.output_dir.rstrip('/')}.partial")
    if out.exists():
        raise ValueError(f"{out} exists; choose another --output_dir or remove it")
    original, tokenizer = load_model(a.model)
    config = original.config
    candidates, length = shareable(config), min(ROW, config.max_position_embeddings)
    number = round(2 * len(candidates) * (1 - a.cache))
    if a.cache < 0.5 or number < 1:
        most = 1 - 0.5 / len(candidates)
        raise ValueError(f"--cache {a.cache}: from 0.5 (all layers shared) to {most:.3g} (one of {len(candidates)})")
    fit_rows, train_rows = max(a.tokens // length, 1), -(-a.train_tokens // length)
    rows = read_rows(a.text, tokenizer, fit_rows + train_rows, length)
    held_out = read_rows([a.eval_text], tokenizer, 1, length, most=64) if a.eval_text else None

    digest = hashlib.sha256(rows.numpy().tobytes()).hexdigest()[:12]
    settings = {k: getattr(a, k) for k in ("model", "tokens", "cache", "fit_epochs", "train_tokens")} | {"text": digest}
    kept = work / "settings.json"
    if kept.exists() and (was := json.loads(kept.read_text())) != settings:
        changed = ", ".join(f"{k} was {was[k]}" for k in settings if was[k] != settings[k])
        raise ValueError(f"{work} belongs to another conversion ({changed}): repeat its command or remove it")
    work.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(settings))
    table = []

    def measure(stage, model):
        if held_out is not None:
            perplexity = math.exp(row_losses(model, held_out).mean())
            print(f"perplexity, {stage}: {perplexity:.3f}", flush=True)
            table.append(f"| {stage} | {perplexity:.3f} |\n")

    measure("original", original)
    if not (work / "moments.pt").exists():
        save(second_moments(original, rows[:fit_rows][: max(MOMENT_TOKENS // length, 1)]), work / "moments.pt")
    C, G = torch.load(work / "moments.pt")
    solutions = {}
    for i in tqdm(candidates, "closed form", unit="layer"):
        solutions[i] = [solve(c, g) for c, g in zip(C[i], G[i], strict=True)]
    shared = sorted(candidates, key=lambda i: sum(price for _, _, price in solutions[i]))[:number]
    student = make_student(original)
    for i in shared:
        share_attention(student.get_decoder().layers[i].self_attn, solutions[i])
    measure("closed form", student)
    if a.fit_epochs:
        fit_layers(original, student, rows[:fit_rows], shared, a.fit_epochs, work / "layers")
        measure("fit", student)
    if train_rows:
        train(original, student, rows[fit_rows:], work / "train.pt")
        measure("training", student)

    layers, dtype = config.num_hidden_layers, AutoConfig.from_pretrained(a.model).dtype or original.dtype
    width = config.num_key_value_heads * original.get_decoder().layers[0].self_attn.head_dim * dtype.itemsize
    before, after = 2 * width * len(candidates), width * (2 * len(candidates) - number)
    card = CARD.format(
        name=a.model, shared=number, layers=layers, after=after, before=before, share=after / before,
        dtype=str(dtype).removeprefix("torch."), tokens=rows.numel(), digest=digest, epochs=a.fit_epochs,
        train=train_rows * length, architecture=type(original).__name__,
        table="".join(["| | perplexity |\n|---|---:|\n", *table]) if table else "",
        window=f", beside {layers - len(candidates)} layers with a window" if len(candidates) < layers else "",
    )  # fmt: skip
    write_output(original, student, dtype, tokenizer, work / "model", card)
    if held_out is not None:
        device = original.device
        del original, student  # a GPU need not hold them beside the saved one
        measure("as saved", AutoModelForCausalLM.from_pretrained(work / "model", dtype="auto").to(device).eval())
    os.replace(work / "model", out)
    shutil.rmtree(work)
    print(f"{out}: {number} of {layers} layers shared, {after:,} bytes of cache a token instead of {before:,}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="folder or hub id of a transformers model")
    text = "plain text, or .jsonl with a field text (chats: the text that the chat template makes), or folders of both"
    parser.add_argument("--text", required=True, nargs="+", help=f"{text}; reading stops at four times what is needed")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--tokens", type=int, default=65536, help="of calibration text (default 65536)")
    parser.add_argument("--cache", type=float, default=0.5, help="share of the cache that is left (default 0.5)")
    parser.add_argument("--fit_epochs", type=int, default=3, help="passes of the fit; 0: the closed form alone")
    parser.add_argument("--train_tokens", type=int, default=0, help="of text to train all attention on after the fit")
    parser.add_argument("--eval_text", help="text whose perplexity is printed before and after each stage")
    try:
        convert(parser.parse_args(argv))
    except (ValueError, OSError) as e:
        sys.exit(f"share_kv.py: {e}")


if __name__ == "__main__":
    main()
