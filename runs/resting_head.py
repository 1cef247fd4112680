"""What conversion costs where a head rests on the first position, as many heads of large models do.

    python runs/resting_head.py PATH.pt --data scaling_data

One head of a trained QKV is made to do so: its queries are a constant, and its keys find a direction that the
embedding of the first position is given. The model is then converted in three ways.
"""

import sys
from functools import partial
from itertools import islice
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from other_conversions import DEFAULT, convert_by

import convert_checkpoint as cc
from common import Parser, script_of

LAYER = 1
STRENGTH = 20  # of the new direction, and of the score that it gives
WAYS = [DEFAULT, DEFAULT | {"weighting": "gradient, only it"}, DEFAULT | {"weighting": "activation"}]


@torch.no_grad()
def make_head_rest(model, loader):
    """Change head 0 of the layer, whose value at the first position is 0 then."""
    C, head_dim = model.config.n_embd, model.config.n_embd // model.config.n_head
    direction = torch.randn(C, generator=torch.Generator().manual_seed(0))
    direction -= direction.mean()
    model.wpe.weight[0] += STRENGTH * direction / direction.norm()

    # the key that tells the first position from the others best: by 1, where theirs vary least
    inputs = []
    for input_ids, _ in islice(loader, 40):
        inputs += cc.inputs_of([model.h[LAYER].attn], model, input_ids)
    first, others = torch.cat(inputs).double().tensor_split([1], dim=1)
    difference = first.mean(dim=(0, 1)) - others.mean(dim=(0, 1))
    covariance = torch.cov(others.flatten(0, 1).T) + 1e-3 * torch.eye(C)
    key = torch.linalg.solve(covariance, difference)
    key /= key @ difference

    weight, bias = model.h[LAYER].attn.c_attn.weight, model.h[LAYER].attn.c_attn.bias
    weight[:head_dim] = 0
    bias[:head_dim] = 0
    bias[0] = STRENGTH * head_dim**0.5
    weight[C] = key.float()
    bias[C] = 0
    value = slice(2 * C, 2 * C + head_dim)
    bias[value] = -weight[value] @ first.mean(dim=(0, 1)).float()


def main(arguments=None):
    parser = Parser(__file__, __doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    options = parser.parse_args(arguments)

    for way in WAYS:
        alias, contents, model = cc.read_source(options.checkpoint)
        config = cc.target_config(alias, model.config, "kv", None)
        make_head_rest(model, cc.open_data(options.data / "train", contents, config, seed=1))
        val_loader = cc.open_data(options.data / "validation", contents, config, batch_tokens=4096)
        before = script_of(alias).evaluate(model, val_loader)["text_loss"]
        calibration = partial(cc.open_data, options.data / "train", contents, config, seed=42)
        target = script_of("kv").GPT_QKV_KEqualsV(config)
        target.load_state_dict(convert_by(way, model, "kv", config, calibration))
        price = script_of("kv").evaluate(target.eval(), val_loader)["text_loss"] - before
        print(f"{way['weighting']}: {before:.4f} before, {price:+.4f} nats after")


if __name__ == "__main__":
    main()
