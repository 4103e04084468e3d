"""A server's draft as SGLang holds it (fused qkv and gate_up, shared embedding), its reloader, and
the directory that a trainer writes."""

from types import SimpleNamespace

import torch
from torch import nn

from aurora_sglang_plugin.config import SwapConfig, WeightsConfig
from aurora_sglang_plugin.serve.swap import Reloader
from aurora_sglang_plugin.weights.writer import WeightsWriter

H, HEADS, KV, I, V, VD, PAD = 8, 4, 2, 12, 32, 20, 24  # noqa: E741
TARGET = "f" * 32


class Draft(nn.Module):
    """As sglang.srt.models.llama_eagle3: silent about unknown names, loaders attached to the
    parameters.
    """

    def __init__(self, embedding: nn.Parameter):
        super().__init__()
        self.config = SimpleNamespace(
            hidden_size=H, intermediate_size=I, num_attention_heads=HEADS, num_key_value_heads=KV,
            vocab_size=V,
            draft_vocab_size=VD, tie_word_embeddings=False, rms_norm_eps=1e-6,
            eagle_config={"eagle_aux_hidden_state_layer_ids": [0, 1, 2]},
        )  # fmt: skip
        self.model = nn.Module()
        self.model.embed_tokens = nn.Module()
        self.model.embed_tokens.weight = embedding
        self.model.fc = nn.Linear(3 * H, H, bias=False)
        layer = nn.Module()
        layer.self_attn = nn.Module()
        layer.self_attn.qkv_proj = nn.Linear(2 * H, (HEADS + 2 * KV) * 2, bias=False)
        layer.self_attn.o_proj = nn.Linear(HEADS * 2, H, bias=False)
        layer.mlp = nn.Module()
        layer.mlp.gate_up_proj = nn.Linear(H, 2 * I, bias=False)
        layer.mlp.down_proj = nn.Linear(I, H, bias=False)
        layer.hidden_norm = nn.RMSNorm(H)
        self.model.layers = nn.ModuleList([layer])
        self.model.norm = nn.RMSNorm(H)
        self.lm_head = nn.Linear(H, PAD, bias=False)
        layer.self_attn.qkv_proj.weight.weight_loader = self.load_qkv
        layer.mlp.gate_up_proj.weight.weight_loader = self.load_gate_up
        self.lm_head.weight.weight_loader = self.load_head

    def load_qkv(self, param, loaded, shard):
        start, size = {
            "q": (0, HEADS * 2),
            "k": (HEADS * 2, KV * 2),
            "v": ((HEADS + KV) * 2, KV * 2),
        }[shard]
        view = param.data.narrow(0, start, size)
        assert view.shape == loaded.shape
        view.copy_(loaded)

    def load_gate_up(self, param, loaded, shard):
        param.data.narrow(0, shard * I, I).copy_(loaded)

    def load_head(self, param, loaded):
        param[: len(loaded)].data.copy_(loaded)
        param[len(loaded) :].data.fill_(0)

    def load_weights(self, weights):
        params = dict(self.named_parameters())
        fused = [("qkv_proj", "q_proj", "q"), ("qkv_proj", "k_proj", "k"),
        ("qkv_proj", "v_proj", "v"),
                 ("gate_up_proj", "gate_proj", 0), ("gate_up_proj", "up_proj", 1)]  # fmt: skip
        for name, loaded in weights:
            for new, old, shard in fused:
                if old in name:
                    param = params[f"model.{name}".replace(old, new)]
                    param.weight_loader(param, loaded, shard)
                    break
            else:
                param = params.get(name, params.get(f"model.{name}"))
                if param is not None:
                    loader = getattr(param, "weight_loader", lambda p, w: p.data.copy_(w))
                    loader(param, loaded)


def checkpoint(seed: float) -> dict[str, torch.Tensor]:
    layer = "midlayer."
    shapes = {
        "fc.weight": (H, 3 * H), "norm.weight": (H,), "lm_head.weight": (VD, H),
        layer + "self_attn.q_proj.weight": (HEADS * 2, 2 * H),
        layer + "self_attn.k_proj.weight": (KV * 2, 2 * H),
        layer + "self_attn.v_proj.weight": (KV * 2, 2 * H),
        layer + "self_attn.o_proj.weight": (H, HEADS * 2),
        layer + "mlp.gate_proj.weight": (I, H), layer + "mlp.up_proj.weight": (I, H),
        layer + "mlp.down_proj.weight": (H, I), layer + "hidden_norm.weight": (H,),
    }  # fmt: skip
    tensors = {n: torch.full(s, float(seed)) for n, s in shapes.items()}
    return tensors | {
        "d2t": torch.arange(VD) % 7 * 0 + int(seed) % 5,
        "t2d": torch.zeros(V, dtype=torch.bool),
    }


class Site:
    """A server's draft, its reloader, and the directory that a trainer writes."""

    def __init__(self, directory, **swap):
        self.directory = directory
        self.writer = WeightsWriter(directory)
        self.embedding = nn.Parameter(torch.randn(V, H))
        self.model = Draft(self.embedding)
        self.hot = torch.arange(VD)
        self.reloader = Reloader(
            self.model,
            self.hot,
            WeightsConfig(directory=directory),
            SwapConfig(poll_s=0.001, **swap),
            TARGET,
        )
        self.embedding_before = self.embedding.detach().clone()
        self.addresses = self.find_addresses()

    def find_addresses(self):
        return {n: p.data_ptr() for n, p in self.model.named_parameters()} | {
            "hot": self.hot.data_ptr()
        }

    def publish(self, tensors, config=None, target=TARGET):
        return self.writer.publish(
            tensors, config or {"hidden_size": H}, target=target, parent=0, optimizer_step=1
        )

    def step(self):
        self.reloader._watcher.poll()
        return self.reloader.apply_pending()

    def count_writes(self):
        return self.model.lm_head.weight._version

    def assert_whole(self, seed):
        """Every parameter, padding apart, holds `seed`; the embedding and all addresses are as they
        were.
        """
        for name, p in self.model.named_parameters():
            if "embed_tokens" not in name:
                values = p[:VD] if name == "lm_head.weight" else p
                assert (values == float(seed)).all(), name
        assert (self.model.lm_head.weight[VD:] == 0).all()
        assert torch.equal(self.hot, torch.arange(VD) + int(seed) % 5)
        assert torch.equal(self.embedding, self.embedding_before)
        assert self.find_addresses() == self.addresses
