"""The initial weights of a run of scaling.sh or conversion.py: QKV's of a seed, as far as a variant has them.

    python runs/initial_weights.py kv --model_config configs/model_config_scaling_64.yaml --seed 42 \
        --output start.pt
    python transformer_KV_1_300_M.py --init_from start.pt seed=42 ...

A training script draws its weights tensor by tensor, so at one seed two variants start from different
numbers. Here QKV is drawn, and every other variant takes from it what they have in common:

    embeddings, LayerNorms, c_proj, MLP     the same
    c_q, c_k                                the rows of the query and of the key in QKV's c_attn
    fewer KV heads                          the first of QKV's
"""

import sys
from dataclasses import asdict
from pathlib import Path

import torch
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import VARIANTS, Parser, script_of, write_atomically


def build(alias, model_config):
    """A fresh model of a variant, and the module of its training script."""
    script = script_of(alias)
    model = getattr(script, VARIANTS[alias]["class"])(script.ModelConfig(**model_config))
    return model, script


def shared_weights(alias, own, qkv):
    """The state dict of a variant, of the shapes in `own`, out of the state dict of QKV."""
    weights = {}
    for name, tensor in own.items():
        if name in qkv:
            weights[name] = qkv[name]
            continue
        prefix, projection, kind = name.rsplit(".", 2)
        q, k, v = qkv[f"{prefix}.c_attn.{kind}"].chunk(3)
        rows = len(tensor)
        if projection == "c_q":
            weights[name] = q
        elif projection == "c_kv" and alias != "qmqa":
            weights[name] = torch.cat([k[: rows // 2], v[: rows // 2]])
        else:
            weights[name] = k[:rows]  # the key is the value
    return weights


def main(arguments=None):
    parser = Parser(__file__, __doc__)
    parser.add_argument("variant", choices=VARIANTS, help="as in configs/variants.yaml")
    parser.add_argument("--model_config", type=Path, required=True)
    parser.add_argument("--n_kv_groups", type=int, help="KV heads, for the grouped variants")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)

    # Draw QKV as its training script does at this seed.
    model_config = yaml.safe_load(options.model_config.read_text(encoding="utf-8"))
    torch.manual_seed(options.seed)
    qkv, _ = build("kqv", model_config)

    if options.n_kv_groups:
        model_config["n_kv_groups"] = options.n_kv_groups
    model, script = build(options.variant, model_config)
    weights = shared_weights(options.variant, model.state_dict(), qkv.state_dict())
    model.load_state_dict(weights)

    contents = {"variant": script.VARIANT, "step": 0, "model_config": asdict(model.config)}
    contents |= {"model_state_dict": model.state_dict()}
    write_atomically(options.output, lambda file: torch.save(contents, file))


if __name__ == "__main__":
    main()
