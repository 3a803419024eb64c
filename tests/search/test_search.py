"""Search: corpora, the index on disk, batches, embeddings, servers, ``agent-r1 index``."""

import asyncio
import gzip
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from pydantic import Field, ValidationError

from agent_r1 import Outcome, Task, ToolEnv, tool
from agent_r1.errors import ConfigError
from agent_r1.run.recipe import SECTIONS
from agent_r1.search import SEARCHES, Passage, SearchSection, bm25, dense, open_search
from agent_r1.search.batching import BatchedSearcher
from agent_r1.search.corpus import read_corpus, split_contents
from agent_r1.utils import cache_folder as cached
from agent_r1.utils.scope import scope
from tests import DATA_FOLDER, servers

CORPUS = DATA_FOLDER / "multihop" / "corpus.invented.jsonl"
ROWS = [json.loads(line) for line in CORPUS.read_text().splitlines()]
QUERIES = [row["title"] for row in ROWS] + ["a bridge in the old town", "composer born", "zzzz"]


@pytest.fixture(autouse=True)
def cache_home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "agent_r1" / "index"


def make(name, corpus=(CORPUS,), **settings):
    section = SEARCHES.section({"name": name, **settings})
    return SEARCHES.make(section, corpus)


def ask(searcher, *queries, k=3):
    async def together():
        asked = (searcher.search(query, k) for query in queries)
        return await asyncio.gather(*asked, return_exceptions=True)

    return asyncio.run(together())


def write(path, *rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines))
    return path


# Corpora


def parquet(path, rows, **options):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def test_the_same_passages_from_jsonl_gzip_and_parquet(tmp_path):
    packed = tmp_path / "c.jsonl.gz"
    packed.write_bytes(gzip.compress(CORPUS.read_bytes()))
    table = parquet(tmp_path / "c.parquet", ROWS, row_group_size=7)
    expected = [Passage(row["id"], row["title"], row["text"]) for row in ROWS]
    for file in (CORPUS, packed, table):
        assert list(read_corpus([file])) == expected


def test_files_come_one_after_another_and_rows_without_id_are_numbered(tmp_path):
    first = write(tmp_path / "1.jsonl", {"title": "A", "text": "a"}, {"title": "B", "text": "b"})
    second = write(tmp_path / "2.jsonl", {"contents": '"C"\nc\nc'}, {"id": "x", "contents": "d"})
    assert list(read_corpus([first, second])) == [
        Passage("0", "A", "a"),
        Passage("1", "B", "b"),
        Passage("2", "C", "c\nc"),
        Passage("x", "", "d"),
    ]


def test_contents_as_in_search_r1():
    assert split_contents('"Evan Morris"\nEvan Morris was') == ("Evan Morris", "Evan Morris was")
    assert split_contents("Title\nText") == ("Title", "Text")
    assert split_contents('"One line"') == ("", '"One line"')
    assert split_contents('"\n"') == ('"', '"')


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"title": "A"', r"c\.jsonl, line 2: not valid JSON"),
        ("[1]", r"c\.jsonl, line 2: \[1\] is no object"),
        ({"title": "A"}, r"c\.jsonl, line 2: no field 'text'"),
        ({"id": 7, "title": "A", "text": "a"}, r"c\.jsonl, line 2: id = 7 must be text"),
        ({"title": "A", "text": None}, r"c\.jsonl, line 2: text = None must be text"),
        ({"contents": ["a"]}, r"c\.jsonl, line 2: contents = \['a'\] must be text"),
        ('{"title": "A", "text": "\\ud800"}', r"c\.jsonl, line 2: text is not valid Unicode"),
        (
            {"id": "a", "title": "B", "text": "b"},
            r"c\.jsonl, line 2: id = 'a' is that of .*c\.jsonl, line 1, too",
        ),
    ],
)
def test_a_bad_row_is_named(tmp_path, row, message):
    file = write(tmp_path / "c.jsonl", {"id": "a", "title": "A", "text": "a"}, row)
    with pytest.raises(ConfigError, match=message):
        list(read_corpus([file]))


def test_a_bad_file_is_named(tmp_path):
    for name, content, message in [
        ("c.txt", b"", "must end in"),
        ("c.jsonl", b"", "no passages"),
        ("c.jsonl.gz", gzip.compress(CORPUS.read_bytes())[:-9], "not whole gzip"),
        ("d.jsonl.gz", b"{}", "not whole gzip"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match=rf"{name}.*{message}"):
            list(read_corpus([tmp_path / name]))
    with pytest.raises(ConfigError, match=r"there is no file .*none\.jsonl"):
        list(read_corpus([tmp_path / "none.jsonl"]))
    with pytest.raises(ConfigError, match=r"c\.jsonl, line 1: id = .*corpus\.invented"):
        list(read_corpus([CORPUS, write(tmp_path / "c.jsonl", ROWS[3])]))


def test_bad_parquet_is_named(tmp_path):
    table = parquet(tmp_path / "t.parquet", [{"title": "A", "text": "a"}, {"title": "B"}])
    with pytest.raises(ConfigError, match=r"t\.parquet, row 2: text = None must be text"):
        list(read_corpus([table]))
    (tmp_path / "u.parquet").write_bytes(b"PAR0")
    with pytest.raises(ConfigError, match=r"u\.parquet: not valid Parquet"):
        list(read_corpus([tmp_path / "u.parquet"]))


# BM25


def in_memory(queries, k):
    """By the library in memory, without anything of ours; equal scores in the corpus's order."""
    import bm25s
    import Stemmer

    stemmer = Stemmer.Stemmer("english")
    options = {"stopwords": "en", "stemmer": stemmer, "show_progress": False}
    index = bm25s.BM25()
    texts = [f"{row['title']} {row['text']}" for row in ROWS]
    index.index(bm25s.tokenize(texts, **options), show_progress=False)
    for query in queries:
        tokens = bm25s.tokenize([query], **options)
        found, scores = index.retrieve(tokens, k=len(ROWS), show_progress=False)
        ranked = sorted((-s, i) for i, s in zip(found[0], scores[0], strict=True) if s > 0)
        yield [ROWS[i]["id"] for _, i in ranked[:k]]


def test_the_library_s_own_results_alone_and_in_a_batch():
    searcher = make("bm25")
    together = ask(searcher, *QUERIES, k=5)
    assert [ask(searcher, query, k=5)[0] for query in QUERIES] == together
    for found, expected in zip(together, in_memory(QUERIES, 5), strict=True):
        assert [passage.id for passage in found] == expected
    assert together[-1] == []


def test_equal_scores_come_in_the_corpus_s_order(tmp_path):
    rows = [{"title": f"{n}", "text": "same words" if n % 2 else "else"} for n in range(2000)]
    searcher = make("bm25", [write(tmp_path / "c.jsonl", *rows)])
    (found,) = ask(searcher, "words", k=40)
    assert [int(passage.title) for passage in found] == list(range(1, 80, 2))
    assert len(ask(searcher, "words", k=9999)[0]) == 1000
    assert bm25.best(np.array([1.0, 3, 3, 0, 3]), 2) == [1, 2]


def test_the_index_is_made_once_for_a_content(tmp_path, cache_home):
    make("bm25")
    (folder,) = cache_home.iterdir()
    made = folder.stat().st_mtime_ns
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(CORPUS.read_bytes())
    make("bm25", [copy])
    assert [path.stat().st_mtime_ns for path in cache_home.iterdir()] == [made]
    with copy.open("a") as file:
        file.write(json.dumps({"title": "New", "text": "new"}) + "\n")
    make("bm25", [copy])
    assert len(list(cache_home.iterdir())) == 2


def test_of_two_that_make_the_index_one_wins(tmp_path, cache_home):
    with ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(lambda _: bm25.build_index([CORPUS]), range(4)))
    assert len(set(folders)) == 1
    assert list(cache_home.iterdir()) == [folders[0]]

    def fail(folder):
        (folder / "half").write_text("x")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        cached.make_folder(tmp_path / "new" / "index", fail)
    assert list((tmp_path / "new").iterdir()) == []


def test_an_index_in_place_of_the_corpus(tmp_path):
    out = bm25.build_index([CORPUS], tmp_path / "out")
    searcher = make("bm25", (), index=str(out))
    assert ask(searcher, *QUERIES) == ask(make("bm25"), *QUERIES)
    with pytest.raises(ConfigError, match=r"--out .*out: is there already"):
        bm25.build_index([CORPUS], out)
    with pytest.raises(ConfigError, match=r"env\.search\.index = .*agent-r1 index CORPUS"):
        make("bm25", (), index=str(tmp_path))
    (out / "index.json").write_text('{"format": 0}')
    with pytest.raises(ConfigError, match=r"env\.search\.index = .*has format 0, not 1"):
        make("bm25", (), index=str(out))
    with pytest.raises(ConfigError, match="needs a corpus"):
        make("bm25", ())
    with pytest.raises(ConfigError, match="no word in it"):
        make("bm25", [write(tmp_path / "c.jsonl", {"title": "", "text": "the"})])


# Batches


class Slow(BatchedSearcher):
    """Keeps the batches; some queries are bad."""

    def __init__(self):
        super().__init__()
        self.batches = []

    def look_up(self, queries):
        self.batches.append([text for text, _ in queries])
        if "crash" in self.batches[-1]:
            raise RuntimeError("crashed")
        if "mute" in self.batches[-1]:
            return []
        return [ValueError(q) if q == "bad" else [Passage(q, "", "")] * k for q, k in queries]


def test_what_is_asked_at_once_is_one_batch_and_the_same_but_once():
    slow = Slow()
    answers = ask(slow, "a", "b", "a")
    assert slow.batches == [["a", "b"]]
    assert [len(answer) for answer in answers] == [3, 3, 3]
    assert answers[0] is not answers[2]

    async def late(depth, query):
        for _ in range(depth):  # an episode needs some rounds of the loop to come to its call
            await asyncio.sleep(0)
        return await slow.search(query, 1)

    async def episodes():
        return await asyncio.gather(*(late(n % 3, f"q{n}") for n in range(64)))

    asyncio.run(episodes())
    assert len(slow.batches) == 2


def test_failures_are_raised_where_they_were_asked():
    slow = Slow()
    good, bad = ask(slow, "good", "bad")
    assert good[0].id == "good"
    assert isinstance(bad, ValueError)
    assert {type(answer) for answer in ask(slow, "a", "crash")} == {RuntimeError}
    assert str(ask(slow, "mute")[0]) == "0 answers to 1 queries"
    assert ask(slow, "a")[0][0].id == "a"
    assert slow.report()["queries"] == 2


def test_a_query_that_is_given_up_does_not_disturb_the_others():
    slow = Slow()

    async def play():
        tasks = [asyncio.create_task(slow.search(q, 1)) for q in ("a", "b", "c")]
        await asyncio.sleep(0)
        tasks[0].cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    gone, b, c = asyncio.run(play())
    assert isinstance(gone, asyncio.CancelledError)
    assert (b[0].id, c[0].id) == ("b", "c")
    assert slow.batches == [["b", "c"]]


def test_a_loop_that_ends_leaves_nothing_behind():
    slow = Slow()

    async def leave():
        task = asyncio.create_task(slow.search("a", 1))
        await asyncio.sleep(0)
        return task

    assert asyncio.run(leave()).cancelled()
    assert slow._waiting == {}
    assert ask(slow, "b")[0][0].id == "b"


def test_loops_in_several_threads_ask_one_searcher():
    searcher = make("bm25")
    expected = ask(searcher, *QUERIES)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: ask(searcher, *QUERIES), range(8)))
    assert all(result == expected for result in results)


def test_the_report_counts_since_the_last():
    searcher = make("bm25")
    ask(searcher, *QUERIES)
    figures = searcher.report()
    assert figures["queries"] == len(QUERIES)
    assert 0 < figures["p50_ms"] <= figures["p99_ms"]
    assert searcher.report() == {"queries": 0.0}


# Embeddings


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory):
    """A random BERT that knows the corpus's words, as a folder of sentence-transformers."""
    st = pytest.importorskip("sentence_transformers")
    pytest.importorskip("faiss")
    import torch
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizer

    folder = tmp_path_factory.mktemp("bert")
    words = {word for row in ROWS for word in f"{row['title']} {row['text']}".lower().split()}
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (folder / "vocab.txt").write_text("\n".join([*special, *sorted(words)]))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder / "hf")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words) + 5,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
    )
    BertModel(config).save_pretrained(folder / "hf")
    encoder = Transformer(str(folder / "hf"))
    model = st.SentenceTransformer(
        modules=[encoder, Pooling(32, pooling_mode="mean")], device="cpu"
    )
    model.save(str(folder / "st"))
    return folder / "st"


def test_embeddings_find_the_nearest_alone_and_in_a_batch(tiny_bert):
    from sentence_transformers import SentenceTransformer

    searcher = make("dense", model=str(tiny_bert))
    together = ask(searcher, *QUERIES, k=5)
    assert [ask(searcher, query, k=5)[0] for query in QUERIES] == together
    assert [ask(searcher, query, k=2)[0] for query in QUERIES] == [found[:2] for found in together]
    model = SentenceTransformer(str(tiny_bert), device="cpu")
    embed = model.encode([f"{row['title']}\n{row['text']}" for row in ROWS])
    embed = embed / np.linalg.norm(embed, axis=1, keepdims=True)
    for query, found in zip(QUERIES, together, strict=True):
        nearest = np.argsort(-(embed @ model.encode(query)), kind="stable")[:5]
        assert [passage.id for passage in found] == [ROWS[i]["id"] for i in nearest]
    assert len(ask(searcher, "bridge", k=999)[0]) == len(ROWS)


def test_embeddings_are_kept_by_content_model_and_prefix(tiny_bert, tmp_path, cache_home):
    make("dense", model=str(tiny_bert))
    (folder,) = cache_home.iterdir()
    assert isinstance(make("dense", model=str(tiny_bert))._vectors, np.memmap)
    moved = tmp_path / "moved"
    moved.symlink_to(tiny_bert)
    make("dense", model=str(moved), query_prefix="query: ")
    assert list(cache_home.iterdir()) == [folder]
    make("dense", model=str(tiny_bert), passage_prefix="passage: ")
    make("dense", model=str(other_weights(tiny_bert, tmp_path / "other")))
    assert len(list(cache_home.iterdir())) == 3


def other_weights(model, out):
    import torch
    from sentence_transformers import SentenceTransformer

    changed = SentenceTransformer(str(model), device="cpu")
    with torch.no_grad():
        next(iter(changed.parameters())).mul_(1.5)
    changed.save(str(out))
    return out


def test_prefixes_reach_the_model(tiny_bert):
    word = ROWS[0]["title"].split()[0]
    plain = make("dense", model=str(tiny_bert))
    prefixed = make("dense", model=str(tiny_bert), query_prefix=f"{word} ")
    assert ask(prefixed, "composer", k=9) == ask(plain, f"{word} composer", k=9)
    assert ask(prefixed, "composer", k=9) != ask(plain, "composer", k=9)


def test_equal_embeddings_come_in_the_corpus_s_order(tiny_bert, tmp_path):
    rows = [{"title": "", "text": ROWS[n % 2]["text"]} for n in range(60)]
    searcher = make("dense", [write(tmp_path / "c.jsonl", *rows)], model=str(tiny_bert))
    ids = [int(passage.id) for passage in ask(searcher, ROWS[0]["text"], k=5)[0]]
    assert ids == [0, 2, 4, 6, 8]


def test_no_such_model(tmp_path, monkeypatch):
    pytest.importorskip("sentence_transformers")
    with pytest.raises(ConfigError, match=r"env\.search\.model = .*no model"):
        make("dense", model=str(tmp_path / "none"))


# A server


@pytest.fixture(scope="module")
def server():
    with servers.retriever(CORPUS) as (process, address):
        yield process, address


def test_a_server_finds_what_the_index_finds(server):
    expected = ask(make("bm25"), *QUERIES)
    _, address = server
    bare = make("http", url=f"{address}/bare")
    assert ask(bare, *QUERIES) == expected
    assert ask(bare, *QUERIES) == expected  # in another event loop
    found = ask(make("http", url=f"{address}/retrieve"), *QUERIES)
    assert found == [[Passage(p.title, p.title, p.text) for p in passages] for passages in expected]

    async def mixed():
        return await asyncio.gather(bare.search(QUERIES[0], 1), bare.search(QUERIES[0], 2))

    assert asyncio.run(mixed()) == [expected[0][:1], expected[0][:2]]


def test_what_a_server_cannot_answer_is_raised(server):
    _, address = server
    good, bad = ask(make("http", url=f"{address}/bare"), QUERIES[0], "burn")
    assert good == ask(make("bm25"), QUERIES[0])[0]
    assert isinstance(bad, ConnectionError)
    assert "/bare: status 500" in str(bad)
    (other,) = ask(make("http", url=f"{address}/other"), "a")
    assert "/other: not the answer of a retriever: KeyError('result')" in str(other)
    (slow,) = ask(make("http", url=f"{address}/slow", timeout=0.2), "a")
    assert "/slow: ReadTimeout" in str(slow)
    (gone,) = ask(make("http", url="http://127.0.0.1:9/retrieve"), "a")
    assert "127.0.0.1:9/retrieve: ConnectError" in str(gone)
    with pytest.raises(ValidationError, match="url"):
        make("http", url="localhost:8000/retrieve")


# In an environment


class Library(ToolEnv):
    """An environment with a search of one's own choice."""

    class Settings(ToolEnv.Settings):
        search: SearchSection = Field(default={}, validate_default=True)

    @classmethod
    def tasks(cls, settings, split):
        return [Task("q", "Who?", "x")]

    def start(self):
        super().start()
        self.searcher = open_search(self.settings.search, [CORPUS])

    @tool
    async def search(self, query: str) -> list[Passage]:
        """Search.

        Args:
            query: A few words.
        """
        return await self.searcher.search(query, 2)

    def score(self, answer):
        return Outcome(1.0)


def test_episodes_share_a_searcher_which_the_settings_choose():
    def started(**search):
        env = Library(Library.Settings(name="library", search=search))
        asyncio.run(env.reset(Task("q", "Who?", "x"), 0))
        return env.searcher

    with scope():
        first = started()
        assert first is started(name="bm25")
        assert first is not started(name="http", url="http://localhost:8000/retrieve")
    assert isinstance(first, bm25.BM25)
    with scope():
        assert started() is not first, "another run has its own"
    assert SECTIONS["env.search"] is SEARCHES


# The command


def run(*arguments):
    command = [sys.executable, "-m", "agent_r1.cli", "index", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ, timeout=120)


def test_the_command_makes_an_index_or_warms_the_cache(tmp_path, cache_home):
    out = tmp_path / "out"
    result = run(CORPUS, "--out", out, "--json", "--try", "Mount Velen")
    figures = json.loads(result.stdout)
    assert result.stderr == ""
    assert (figures["index"], figures["passages"]) == (str(out), len(ROWS))
    assert figures["found"][0]["title"] == "Mount Velen"
    result = run(CORPUS)
    assert f"{len(ROWS)} passages in " in result.stdout
    assert bm25.build_index([CORPUS]) == next(cache_home.iterdir())
    result = run(CORPUS, "--out", out)
    assert result.returncode == 2
    assert "is there already" in result.stderr


def test_without_torch_and_without_the_libraries():
    code = (
        "import sys; sys.modules['Stemmer'] = sys.modules['faiss'] = None\n"
        "from agent_r1.cli import main\n"
        f"assert main(['index', {str(CORPUS)!r}]) == 2\n"
        "from pathlib import Path\n"
        "from agent_r1.search import SEARCHES, open_search\n"
        f"try: open_search(SEARCHES.section({{'name': 'dense', 'model': 'x'}}), [])\n"
        "except ValueError as error: print(error, file=sys.stderr)\n"
        "assert 'torch' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "search 'bm25' needs 'Stemmer': pip install 'agent-r1[multihop]'" in result.stderr
    assert "search 'dense' needs 'faiss': pip install 'agent-r1[dense]'" in result.stderr


def test_dense_settings_are_checked():
    with pytest.raises(ValidationError, match="model"):
        SEARCHES.section("dense")
    assert dense.Dense.Settings(model="x").device == "cpu"
