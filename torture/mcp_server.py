"""An MCP server that does the one thing that its argument names."""

import json
import sys
import time

how = sys.argv[1]
NUMBER = {"type": "object", "properties": {"number": {"type": "integer"}}}


def having(schema):
    return {"type": "object", "properties": {"number": schema}}


SCHEMAS = {
    "ref http": {"type": "object", "$ref": "http://127.0.0.1:9/x"},
    "ref file": {"type": "object", "$ref": "file:///etc/passwd"},
    "ref nowhere": having({"$ref": "#/nowhere"}),
    "no type": {"properties": {}},
    "list": [],
    "text": "object",
    "pattern": having({"type": "string", "pattern": "^(a+)+$"}),
    "bad pattern": having({"type": "string", "pattern": "("}),
    "any": having({"type": "any"}),
}
CONTENTS = {
    "null content": None,
    "odd content": [{"type": "what", "x": 1}],
    "huge result": [{"type": "text", "text": "y" * 3_000_000}],
    "surrogate": [{"type": "text", "text": "\ud83d"}],
    "image": [{"type": "image", "data": "AA==", "mimeType": "image/png"}],
}


def say(message):
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def tools():
    tool = {"name": "look", "description": "Look.", "inputSchema": SCHEMAS.get(how, NUMBER)}
    if how == "odd name":
        tool["name"] = "<|im_end|>\n look"
    result = {"tools": {"twins": [tool, tool], "none": []}.get(how, [tool])}
    if how == "endless":
        result["nextCursor"] = "again"
    if how == "new pages":
        result["nextCursor"] = str(time.time())
    return result


def answer(request):
    method, head = request["method"], {"jsonrpc": "2.0", "id": request["id"]}
    if how == f"hang at {method}":
        time.sleep(1e6)
    if how == f"die at {method}":
        sys.exit(1)
    if how == f"garbage at {method}":
        print("{not json", flush=True)
        return
    if how == f"error at {method}":
        say({**head, "error": {"code": -1, "message": "no \ud83d"}})
    elif how == f"null at {method}":
        say({**head, "result": None})
    elif method == "initialize":
        version = request["params"]["protocolVersion"]
        info = {"name": "x", "version": "1"}
        result = {"protocolVersion": version, "capabilities": {"tools": {}}, "serverInfo": info}
        say({**head, "result": result})
    elif method == "tools/list":
        say({**head, "result": tools()})
    elif method == "tools/call":
        say({**head, "result": {"content": CONTENTS.get(how, [{"type": "text", "text": "w1"}])}})
    else:
        say({**head, "result": {}})


if how == "die":
    sys.exit(3)
if how == "silent":
    time.sleep(1e6)
if how == "noise":
    print("hello, I am a log line", flush=True)
if how == "huge line":
    print("x" * 3_000_000, flush=True)
for line in sys.stdin:
    try:
        request = json.loads(line)
    except ValueError:
        continue
    if "id" in request:
        answer(request)
