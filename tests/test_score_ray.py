"""examples/score_corpus_ray.py on a Ray of this machine: bits, order, resumption."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import ray

from gpt2core import GPT2
from gpt2core.testing import random_checkpoint

pytestmark = pytest.mark.filterwarnings(r"ignore:.use_\w+. is deprecated")  # Ray Data's own
EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """The example as a module, a file of texts, and a checkpoint, beside a Ray that runs."""
    spec = importlib.util.spec_from_file_location("score_corpus_ray", EXAMPLES / "score_corpus_ray.py")
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    ray.cloudpickle.register_pickle_by_value(module)
    folder = tmp_path_factory.mktemp("corpus")
    texts = folder / "texts.jsonl"
    lines = [json.dumps({"text": f"text number {i} " * (1 + i % 3)}) for i in range(11)]
    lines[4], lines[7] = "", '{"text": 5}'
    texts.write_text("\n".join(lines) + "\n")
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=128 * 2**20,
        _node_ip_address="127.0.0.1",
    )
    yield module, texts, str(random_checkpoint(folder / "model"))
    ray.shutdown()
    ray.cloudpickle.unregister_pickle_by_value(module)
    sys.path[:] = path
    for name in ("score_corpus_ray", "batch_inference_ray"):
        sys.modules.pop(name, None)


def rows_of(output):
    lines = [line for path in sorted(output.glob("part-*")) for line in path.read_text().splitlines()]
    return [json.loads(line) for line in lines]


def test_numbers_depend_neither_on_the_parts_nor_on_the_actors_and_come_in_order(example, tmp_path):
    module, texts, folder = example
    args = ["--model", folder, "--bos"]
    module.main([str(texts), str(tmp_path / "one"), *args])
    module.main([str(texts), str(tmp_path / "two"), *args, "--part-size", "3", "--actors", "2"])
    rows = rows_of(tmp_path / "one")
    assert len(list((tmp_path / "two").glob("part-*"))) == 4
    assert rows == rows_of(tmp_path / "two")
    assert [row["line"] for row in rows] == [1, 2, 3, 4, 6, 7, 8, 9, 10, 11]
    assert "expected a text" in rows[6]["reason"]
    with GPT2.from_pretrained(folder, backend="native") as model:
        assert rows[1]["logprob"] == model.score("text number 1 text number 1 ", bos="eos").logprob


def test_what_is_finished_is_kept_and_what_is_missing_is_made(example, tmp_path, capsys):
    module, texts, folder = example
    line = [str(texts), str(tmp_path / "out"), "--model", folder, "--part-size", "4", "--by", "word"]
    module.main(line)
    rows = rows_of(tmp_path / "out")
    (tmp_path / "out" / "part-00001.jsonl").unlink()
    module.main(line)
    assert "3 parts, 2 of them done" in capsys.readouterr().err
    assert rows_of(tmp_path / "out") == rows
    with pytest.raises(SystemExit, match="differs in choices"):
        module.main([*line, "--bos"])
