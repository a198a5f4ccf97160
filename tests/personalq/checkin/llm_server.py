"""An OpenAI-compatible endpoint that behaves as it is told: ``python llm_server.py MODE`` prints its port, then serves.

It judges by the data it is sent, as a model would: a candidate whose card shares a word with the request scores 3.
"""

from __future__ import annotations

import json
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

MODE = sys.argv[1]
CALLS: list[dict[str, Any]] = []


def judgement(body: dict[str, Any]) -> str:
    """The answer of a model that reads names and descriptions."""
    data = json.loads(body["messages"][1]["content"])
    said = set(data["request"].lower().split())
    text = {c["id"]: f"{c['name']} {c.get('description', '')}".lower() for c in data["candidates"]}
    scores = [
        {"id": i, "score": 3 if MODE != "none" and said & set(t.split()) - {"dog", "the"} else 0}
        for i, t in text.items()
    ]
    best = [s for s in scores if s["score"] == 3]
    verdict = "none" if not best else "one" if len(best) == 1 else "several"
    return json.dumps({"scores": scores, "verdict": verdict})


def answer(body: dict[str, Any]) -> str:
    """The text of the completion in this mode."""
    format_ = body.get("response_format", {}).get("type")
    if MODE == "garbage":
        return "Sure! The best checkpoint is obviously number one."
    if MODE == "injected":
        return json.dumps({"scores": [{"id": "../../etc", "score": 3}, {"id": "c99", "score": 3}], "verdict": "one"})
    if MODE == "second_try" and len(CALLS) == 1:
        return "{not json"
    if MODE == "thinks" and format_ != "json_schema":
        return f"<think>{{}} maybe c1?</think> Here it is: {judgement(body)} Hope this helps."
    return judgement(body)


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        CALLS.append(body)
        if MODE == "slow":
            time.sleep(5)
        format_ = body.get("response_format", {}).get("type")
        refuses = {"no_schema": ("json_schema",), "no_format": ("json_schema", "json_object")}.get(MODE, ())
        if format_ in refuses:
            self.reply(400, {"error": {"message": f"{format_} is not supported"}})
        elif MODE == "broken":
            self.reply(500, {"error": {"message": "out of memory"}})
        else:
            choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": answer(body)}}
            self.reply(200, {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]})

    def do_GET(self) -> None:
        self.reply(200, CALLS)

    def reply(self, status: int, data: Any) -> None:
        text = json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        pass


if __name__ == "__main__":
    server = HTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()
