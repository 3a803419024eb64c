"""A search server with Search-R1's interface: retriever.py PORT CORPUS.

``/retrieve`` answers as Search-R1's own, ``/bare`` with fields and without scores, ``/slow`` after
a second, ``/other`` something else. The query "burn" is more than it bears.
"""

import asyncio
import json
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from agent_r1.search import SEARCHES, open_search

SEARCHER = open_search(SEARCHES.section("bm25"), [Path(sys.argv[2])])


async def find(queries, k):
    return await asyncio.gather(*(SEARCHER.search(query, k) for query in queries))


def documents(path, found):
    if path == "/bare":
        return [vars(passage) for passage in found]
    return [
        {"document": {"contents": f'"{p.title}"\n{p.text}'}, "score": 1.0 / rank}
        for rank, p in enumerate(found, 1)
    ]


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/slow":
            time.sleep(1)
        if "burn" in asked["queries"]:
            return self.send(500, "on fire")
        if self.path == "/other":
            return self.send(200, {"answer": 42})
        found = asyncio.run(find(asked["queries"], asked["topk"]))
        return self.send(200, {"result": [documents(self.path, passages) for passages in found]})

    def send(self, status, value):
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments):
        pass


ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
