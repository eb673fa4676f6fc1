"""The example that measures what fewer bits cost."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
TEXT = (
    "The old king sat by the window and looked out over the sea. It had been raining since the morning, and "
    "the ships lay still in the harbour. 'Will they come to-day?' asked the little princess, who had been "
    "standing behind his chair for a long time without saying a word. 'They will come when the wind turns,' "
    "said the king, 'and not an hour before; the wind has never yet asked a king when to blow.'"
)


def test_the_quality_script_prints_a_table_and_names_what_a_backend_does_not_run(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    script = str(ROOT / "examples/quantization_quality.py")
    command = [sys.executable, script, str(tmp_path / "text.txt"), "--precisions", "int8,bfloat16"]
    lines = subprocess.run(
        [*command, "--backends", "numpy,onnx"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    rows = {tuple(cells[:2]): cells[2:] for line in lines[2:] if (cells := re.findall(r"[^|]*[^| ]", line))}
    rows = {tuple(cell.strip() for cell in key): [c.strip() for c in cells] for key, cells in rows.items()}
    perplexity, change, kl, top, off = rows["int8", "numpy"]
    assert 5 < float(perplexity) < 500
    assert abs(float(change.removesuffix(" %"))) < 0.5
    assert 0 < float(kl) < 1e-3
    assert float(top.removesuffix(" %")) > 95
    assert float(off) < 1e-5, "NumPy must differ from the dequantized weights by rounding only"
    assert rows["float32", "numpy"][1:4] == ["+0.000 %", "0.00e+00", "100.00 %"]
    assert "does not run precision 'bfloat16'" in rows["bfloat16", "onnx"][0]
