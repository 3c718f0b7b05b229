"""scripts/forward.py as a user runs it, against transformers on the same tokens and pictures."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from gvl_jax.data import tiny

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "forward.py"
PICTURES = {"wide.png": (230, 70), "tall.png": (60, 150)}
RECORDS = [
    {"id": "text", "request": "How do I wash my car?", "response": "With soap."},
    {"id": "one", "request": "What is this?", "images": ["wide.png"]},
    {"id": "two", "request": "", "response": "Two pictures.", "images": ["tall.png", "wide.png"]},
]


def load_script():
    spec = importlib.util.spec_from_file_location("forward", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint that transformers saved, with our tokenizer; records and their pictures."""
    folder = tmp_path_factory.mktemp("forward")
    model = folder / "model"
    tiny.write_tiny(model, ["How do I wash my car? With soap."], vocab_size=300)
    raw = json.loads((model / "config.json").read_text())
    raw["text_config"] |= {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}
    raw["vision_config"] |= {"depth": 2, "fullatt_block_indexes": [1], "hidden_size": 32, "intermediate_size": 48}
    torch.manual_seed(0)
    reference = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**raw)).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    reference.save_pretrained(model)

    rng = np.random.default_rng(0)
    for name, (width, height) in PICTURES.items():
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(folder / name)
    lines = [json.dumps(record) for record in RECORDS]
    (folder / "records.jsonl").write_text("\n\n".join(lines) + "\n")  # blank lines are no records
    return folder


def test_logits_and_positions_equal_transformers(folder):
    command = [sys.executable, SCRIPT, folder / "model", folder / "records.jsonl", folder / "out.npz"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    out = np.load(folder / "out.npz")
    assert set(out.files) == {f"{name}_{i}" for name in ("tokens", "positions", "logits") for i in range(3)}

    reference = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "model").eval()
    image_id = reference.config.image_token_id
    processor = Qwen2VLImageProcessorPil.from_pretrained(folder / "model")
    for i, record in enumerate(RECORDS):
        tokens = torch.tensor(out[f"tokens_{i}"])[None].long()
        inputs = {"input_ids": tokens, "mm_token_type_ids": (tokens == image_id).int()}
        grids = None
        if "images" in record:
            pictures = processor([Image.open(folder / name) for name in record["images"]], return_tensors="pt")
            grids = pictures["image_grid_thw"]
            inputs |= {"pixel_values": pictures["pixel_values"], "image_grid_thw": grids}
        with torch.no_grad():
            logits = reference(**inputs, attention_mask=torch.ones_like(tokens)).logits[0].numpy()
        positions, _ = reference.model.get_rope_index(tokens, inputs["mm_token_type_ids"], image_grid_thw=grids)
        np.testing.assert_array_equal(out[f"positions_{i}"], positions[:, 0].numpy())
        np.testing.assert_allclose(out[f"logits_{i}"], logits, atol=1e-4, rtol=0)
        assert np.std(logits) > 0.1  # not a comparison of zeros


def test_what_cannot_be_run_is_one_line_and_leaves_no_file(folder, capsys):
    script = load_script()
    (folder / "bad.jsonl").write_text('{"request": "fine"}\n{"request": 3}\n')
    (folder / "lost.jsonl").write_text('{"request": "x", "images": ["nowhere.png"]}\n')
    for model, records, said in (
        ("model", "bad.jsonl", "line 2: key 'request': got 3, expected text or null"),
        ("model", "lost.jsonl", "record 0 (lost:1): image rejected (missing)"),
        ("model", "none.jsonl", "no such records file"),
        ("nothing", "records.jsonl", "is not a directory"),
    ):
        assert script.main([str(folder / model), str(folder / records), str(folder / "bad.npz")]) == 1
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1) and said in err
    with pytest.raises(SystemExit, match="2"):
        script.main([str(folder / "model")])
    assert not list(folder.glob("bad.npz*"))
