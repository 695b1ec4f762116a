"""A server that speaks as an OpenAI-compatible one does, or misbehaves as it is told to."""

import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def completion(text, finish="stop", usage=(11, 7)):
    """The body of a chat completion."""
    return {
        "id": "1", "object": "chat.completion", "created": 1, "model": "m",
        "choices": [{"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text}}],
        "usage": {"prompt_tokens": usage[0], "completion_tokens": usage[1], "total_tokens": sum(usage)},
    }  # fmt: skip


class Served:
    """What a server saw: its requests as they were sent, and the most that were under way at once."""

    def __init__(self, reply):
        self.reply, self.requests, self.headers, self.most, self.now = reply, [], [], 0, 0
        self.lock = threading.Lock()


@contextlib.contextmanager
def serving(reply):
    """(base URL, `Served`) of a server while the block runs.

    reply(request, number) -> a dict, sent as JSON; or {"status", "headers", "text", "wait" (seconds), "cut" (bytes
    that never come)} as a tuple with one dict. number: how many requests came before.
    """
    served = Served(reply)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with served.lock:
                number = len(served.requests)
                served.requests.append(body)
                served.headers.append({name.lower(): value for name, value in self.headers.items()})
                served.now += 1
                served.most = max(served.most, served.now)
            try:
                given = served.reply(body, number)
                how = given[0] if isinstance(given, tuple) else {"text": json.dumps(given)}
                time.sleep(how.get("wait", 0))
                self.send(how)
            finally:
                with served.lock:
                    served.now -= 1

        def send(self, how):
            data = how.get("text", "").encode()
            self.send_response(how.get("status", 200))
            headers = {"Content-Type": "application/json", "Content-Length": len(data) + how.get("cut", 0)}
            for name, value in (headers | how.get("headers", {})).items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(data)
            self.close_connection = bool(how.get("cut"))

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", served
    finally:
        server.shutdown()
        server.server_close()


def refusal(status, message="no", **more):
    """An error as servers of this kind send it."""
    return ({"status": status, "text": json.dumps({"error": {"message": message, **more}})},)
