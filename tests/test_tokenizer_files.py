"""Reading tokenizer files: as transformers reads them, or an error that names file and remedy."""

import json
import shutil

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from tokenizer_folders import (
    END,
    changed,
    gpt2_tokenizer,
    save,
    save_as_vocab_and_merges,
    small_byte_level,
    write_gpt2,
)
from transformers import AutoTokenizer, logging

from gpt2core.errors import CheckpointError, RequestError, UnsupportedCheckpointError
from gpt2core.tokenizer.tokenizer import Tokenizer

REMEDY = "; download the checkpoint again, or save its tokenizer anew with transformers"
SAMPLES = ["the cat", " the cat sat\n", "théâtre 日本 😀", "", f"x{END}y <pad><mask>z", "<tab>a b"]


@pytest.fixture
def small_files(tmp_path):
    return save_as_vocab_and_merges(small_byte_level(), tmp_path)


def refusal(folder) -> str:
    with pytest.raises(CheckpointError) as caught:
        Tokenizer.from_folder(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    return message


# As transformers reads them


def huggingface(folder):
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    logging.set_verbosity_error()  # it warns that no model comes with this
    return AutoTokenizer.from_pretrained(folder)


def write(folder, name, value):
    (folder / name).write_text(json.dumps(value))


def plain(folder):
    save(small_byte_level(added=["<tab>"]), folder)


def vocab_and_merges(folder):
    save_as_vocab_and_merges(small_byte_level(), folder)


def prefix_space_in_tokenizer_config(folder):
    save(small_byte_level(), folder, add_prefix_space=True, tokenizer_class="GPT2Tokenizer")


def prefix_space_in_tokenizer_config_of_no_class(folder):
    save(small_byte_level(), folder, add_prefix_space=True)


def prefix_space_switched_off(folder):
    save(
        small_byte_level(prefix_space=True),
        folder,
        add_prefix_space=False,
        tokenizer_class="GPT2TokenizerFast",
    )


def prefix_space_in_the_config_of_another_class(folder):
    save(small_byte_level(), folder, add_prefix_space=True, tokenizer_class="PreTrainedTokenizerFast")


def prefix_space_for_vocab_and_merges(folder):
    save_as_vocab_and_merges(small_byte_level(), folder, add_prefix_space=True)


def special_only_by_its_name(folder):
    save(small_byte_level(), folder, tokenizer_class="PreTrainedTokenizerFast", eos_token=END)
    changed(folder, demote)


def special_only_in_special_tokens_map(folder):
    save(small_byte_level(), folder, tokenizer_class="PreTrainedTokenizerFast")
    changed(folder, demote)
    write(
        folder,
        "special_tokens_map.json",
        {"bos_token": {"content": END, "lstrip": True, "normalized": False}},
    )


def added_special_tokens(folder):
    save(small_byte_level(added=["<pad>", "<mask>"]), folder, pad_token="<pad>", mask_token="<mask>")


def old_added_tokens(folder):
    save_as_vocab_and_merges(small_byte_level(), folder, pad_token="<pad>")
    write(folder, "added_tokens.json", {"<mask>": 302, "<pad>": 301})


def demote(fields):
    """Make `<|endoftext|>` an ordinary token of the vocabulary."""
    fields["model"]["vocab"][END] = 300
    fields["added_tokens"] = []


LAYOUTS = [
    plain,
    vocab_and_merges,
    prefix_space_in_tokenizer_config,
    prefix_space_in_tokenizer_config_of_no_class,
    prefix_space_switched_off,
    prefix_space_in_the_config_of_another_class,
    prefix_space_for_vocab_and_merges,
    special_only_by_its_name,
    special_only_in_special_tokens_map,
    added_special_tokens,
    old_added_tokens,
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_a_folder_is_read_as_transformers_reads_it(tmp_path, layout):
    layout(tmp_path)
    reference = huggingface(tmp_path)
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.special_ids >= set(reference.all_special_ids)
    for text in SAMPLES:
        ids = reference(text)["input_ids"]
        assert tokenizer.encode(text, allow_special=True) == ids, text
        assert tokenizer.decode(ids) == reference.decode(ids), text
        assert tokenizer.decode(ids, skip_special=True) == reference.decode(ids, skip_special_tokens=True), (
            text
        )


def test_gpt2s_files_are_read_as_transformers_reads_them(tmp_path):
    reference = huggingface(write_gpt2(tmp_path))
    for text in SAMPLES:
        assert gpt2_tokenizer().encode(text, allow_special=True) == reference(text)["input_ids"]


def test_tokenizer_json_goes_before_vocab_and_merges(tmp_path):
    write_gpt2(tmp_path)
    save(small_byte_level(), tmp_path)
    assert Tokenizer.from_folder(tmp_path).vocab_size == 301


def test_endoftext_is_special_wherever_the_vocabulary_has_it(tmp_path):
    changed(save(small_byte_level(), tmp_path), demote)
    tokenizer = Tokenizer.from_folder(str(tmp_path))
    assert tokenizer.special_ids == {300}
    assert 300 not in tokenizer.encode(END)


def test_a_special_token_that_the_vocabulary_lacks_is_not_added(tmp_path):
    save(
        small_byte_level(),
        tmp_path,
        pad_token="<new>",
        sep_token=None,
        cls_token=7,
        mask_token={"content": 3},
    )
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.special_ids) == (301, {300})


def test_special_tokens_may_be_listed_in_every_form(tmp_path):
    raw = small_byte_level(added=["<a>", "<b>", "<c>", "<d>"])
    decoder = {"303": {"content": "<c>", "special": True}, "304": {"content": "<d>", "special": False}}
    save(raw, tmp_path, added_tokens_decoder=decoder, extra_special_tokens={"image": "<a>"})
    write(tmp_path, "special_tokens_map.json", {"additional_special_tokens": [{"content": "<b>"}]})
    assert Tokenizer.from_folder(tmp_path).special_ids == {300, 301, 302, 303}


def test_merges_with_windows_line_ends_or_without_a_version_are_read(small_files):
    want = Tokenizer.from_folder(small_files).encode("the cat sat on the mat")
    text = (small_files / "merges.txt").read_text(encoding="utf-8")
    for other in (text.replace("\n", "\r\n"), text.split("\n", 1)[1], text.rstrip("\n")):
        (small_files / "merges.txt").write_text(other, encoding="utf-8", newline="")
        assert Tokenizer.from_folder(small_files).encode("the cat sat on the mat") == want


def test_a_vocabulary_of_bytes_needs_no_merges(tmp_path):
    folder = save_as_vocab_and_merges(small_byte_level(), tmp_path)
    vocab = json.loads((folder / "vocab.json").read_text())
    write(folder, "vocab.json", {token: i for token, i in vocab.items() if i < 256} | {END: 256})
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = Tokenizer.from_folder(folder)
    assert len(tokenizer.encode("théâtre")) == 9
    assert tokenizer.special_ids == {256}


# Missing and broken files


def test_a_folder_without_a_tokenizer_is_refused_with_what_is_missing(tmp_path):
    assert refusal(tmp_path) == (
        f"{tmp_path} has no tokenizer: tokenizer.json is missing, and so is vocab.json and merges.txt{REMEDY}"
    )


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_half_a_tokenizer_is_refused_with_what_is_missing(small_files, name):
    (small_files / name).unlink()
    assert f"tokenizer.json is missing, and so is {name}; " in refusal(small_files)


def test_a_folder_that_does_not_exist_is_refused(tmp_path):
    assert "has no tokenizer" in refusal(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"])
def test_an_empty_file_is_refused(small_files, name):
    (small_files / name).write_bytes(b"")
    assert refusal(small_files) == f"{small_files / name} is empty{REMEDY}"


def test_a_file_that_may_not_be_read_is_refused(small_files, monkeypatch):
    def refuse(self, mode):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", refuse)
    assert refusal(small_files) == f"{small_files / 'vocab.json'} cannot be read: Permission denied{REMEDY}"


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer.json", "special_tokens_map.json"])
def test_a_folder_in_place_of_a_file_is_refused(small_files, name):
    (small_files / name).unlink(missing_ok=True)
    (small_files / name).mkdir()
    assert refusal(small_files) == f"{small_files / name} is not a file{REMEDY}"


@pytest.mark.parametrize(
    "name", ["vocab.json", "tokenizer.json", "tokenizer_config.json", "added_tokens.json"]
)
@pytest.mark.parametrize(
    "content", [b"{", b"[]", b"\xff\xfe{}", b'{"a": NaN}', b'{"a": 1, "a": 2}', b"[" * 100_000]
)
def test_a_file_that_is_no_json_object_is_refused_by_name(small_files, name, content):
    (small_files / name).write_bytes(content)
    assert refusal(small_files).startswith(f"{small_files / name} ")


def test_a_file_of_absurd_size_is_refused_unread(small_files):
    with (small_files / "tokenizer.json").open("wb") as file:
        file.truncate(2**26 + 1)  # sparse
    assert "tokenizer.json is larger than 67108864 bytes, the limit" in refusal(small_files)


@pytest.mark.parametrize(
    ("vocab", "fault"),
    [
        ({"a": -1}, 'gives the token "a" the id -1, expected a whole number from 0 to 2147483647'),
        ({"a": 2**31}, "the id 2147483648"),
        ({"a": "0"}, 'the id "0"'),
        ({"a": True}, "the id true"),
        ({"a": 1.0}, "the id 1.0"),
        ({"a": 0, "b": 0}, "gives two tokens the same id"),
    ],
)
def test_a_vocabulary_with_bad_ids_is_refused(small_files, vocab, fault):
    write(small_files, "vocab.json", vocab)
    message = refusal(small_files)
    assert message.startswith(f"{small_files / 'vocab.json'} ")
    assert fault in message
    assert message.endswith(REMEDY)


@pytest.mark.parametrize(
    ("merges", "fault"),
    [
        (b"#version: 0.2\nt h\nt zz\n", 'holds as merge 2 ["t", "zz"], but the vocabulary has no token "zz"'),
        (b"t q\n", 'holds as merge 1 ["t", "q"], but the vocabulary has no token "tq"'),
        (b"t h e\n", 'holds as merge 1 ["t", "h", "e"], expected two tokens'),
        (b"th\n", 'holds as merge 1 ["th"], expected two tokens'),
        (b"t \xff\n", "is not UTF-8"),
        (b"#version: 0.2\n", "holds no merges, and vocab.json 301 tokens"),
    ],
)
def test_merges_that_do_not_fit_the_vocabulary_are_refused(small_files, merges, fault):
    (small_files / "merges.txt").write_bytes(merges)
    message = refusal(small_files)
    assert message.startswith(f"{small_files / 'merges.txt'} ")
    assert fault in message
    assert message.endswith(REMEDY)


def edit_merges(merges):
    return lambda fields: fields["model"].update(merges=merges)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (edit_merges([["t", "zz"]]), 'holds as merge 1 ["t", "zz"], but the vocabulary has no token "zz"'),
        (edit_merges(["t zz"]), 'holds as merge 1 ["t", "zz"], but'),
        (edit_merges([5]), "holds as merge 1 5, expected two tokens"),
        (edit_merges([["t", 5]]), 'holds as merge 1 ["t", 5], expected'),
        (edit_merges("t h"), "is not a tokenizer that can be read: "),
        (lambda fields: fields.pop("model"), "Model missing"),
        (lambda fields: fields["model"].update(type="Zork"), "is not a tokenizer that can be read: "),
        (lambda fields: fields["model"].update(vocab=[]), "is not a tokenizer that can be read: "),
        (lambda fields: fields["model"]["vocab"].update(t=-5), "is not a tokenizer that can be read: "),
        (
            lambda fields: fields.update(pre_tokenizer={"type": "Zork"}),
            "is not a tokenizer that can be read: ",
        ),
        (
            lambda fields: fields["added_tokens"][0].update(id=400),
            f'gives the added token "{END}" the id 400, and its place is 300',
        ),
    ],
)
def test_a_broken_tokenizer_json_is_refused(tmp_path, change, fault):
    folder = changed(save(small_byte_level(), tmp_path), change)
    message = refusal(folder)
    assert message.startswith(f"{folder / 'tokenizer.json'} ")
    assert fault in message
    assert message.endswith(REMEDY)


def test_a_broken_tokenizer_json_is_not_passed_over_for_vocab_and_merges(small_files):
    (small_files / "tokenizer.json").write_text("{")
    assert "tokenizer.json is not strict JSON" in refusal(small_files)


@pytest.mark.parametrize(
    ("added", "fault"),
    [
        ({"<pad>": 500}, 'gives the added token "<pad>" the id 500, and its place is 301'),
        ({"<pad>": 301, "<x>": "302"}, 'gives the added token "<x>" the id "302", and its place is 302'),
    ],
)
def test_added_tokens_with_gaps_are_refused(small_files, added, fault):
    write(small_files, "added_tokens.json", added)
    assert f"added_tokens.json {fault}" in refusal(small_files)


def test_a_panic_of_the_library_is_a_typed_error(tmp_path, capfd):
    """A merge beyond the longest token; our own check leaves it out because the vocabulary has a prefix."""

    def change(fields):
        model = {"continuing_subword_prefix": "#", "vocab": {"aaa": 0, "#bb": 1}, "merges": [["aaa", "#bb"]]}
        fields["model"].update(model)
        fields["added_tokens"] = []

    message = refusal(changed(save(small_byte_level(), tmp_path), change))
    assert "is not a tokenizer that can be read: range end index" in message
    assert "panicked" in capfd.readouterr().err  # printed by the library: why we check merges ourselves


def test_an_interrupt_is_no_broken_file(tmp_path, monkeypatch):
    def interrupted(data):
        raise KeyboardInterrupt

    save(small_byte_level(), tmp_path)
    monkeypatch.setattr("gpt2core.tokenizer.files.Tokenizer.from_buffer", interrupted, raising=False)
    with pytest.raises(KeyboardInterrupt):
        Tokenizer.from_folder(tmp_path)


def test_an_unsupported_decoder_is_refused_by_name(tmp_path):
    decoder = {"type": "BPEDecoder", "suffix": "</w>"}
    folder = changed(save(small_byte_level(), tmp_path), lambda fields: fields.update(decoder=decoder))
    with pytest.raises(
        UnsupportedCheckpointError, match=r'decoder is \{"type": "BPEDecoder".* supported are'
    ):
        Tokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    return save(small_byte_level(), tmp_path_factory.mktemp("intact"))


@settings(max_examples=200)
@given(data=st.data())
def test_a_damaged_tokenizer_json_gives_a_typed_error_or_still_reads(intact, tmp_path_factory, data):
    content = bytearray((intact / "tokenizer.json").read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        del content[place:]
    else:
        content[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    folder = tmp_path_factory.mktemp("damaged", numbered=True)
    (folder / "tokenizer.json").write_bytes(content)
    try:
        tokenizer = Tokenizer.from_folder(folder)
        assert tokenizer.vocab_size > 0
        tokenizer.encode("the cat")
    except (CheckpointError, RequestError) as error:
        event(type(error).__name__)
    finally:
        shutil.rmtree(folder)
