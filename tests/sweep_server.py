"""The few answers of W&B's server that ``wandb sweep`` and ``wandb agent`` live on, given from this machine."""

import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

Draw = Callable[[dict[str, Any]], dict[str, Any]]


class SweepServer:
    """Takes one sweep and hands out its runs to any number of agents, one run each at a time; as a context.

    Args:
        runs: how many runs to hand out altogether, before every agent is told to leave.
        draw: chooses parameters, given the sweep's; W&B's server would search here.

    Attributes:
        sweep: the sweep's file as it arrived, ready for `draw`.
        handed_out: parameters of every run, by id.
        agents: ids of the runs that each agent was given.
    """

    def __init__(self, runs: int, draw: Draw) -> None:
        self.sweep: dict[str, Any] = {}
        self.handed_out: dict[str, dict[str, Any]] = {}
        self.agents: dict[str, list[str]] = {}
        self._runs, self._draw, self._lock = runs, draw, threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "SweepServer":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        """Answer one request by the name of its operation."""
        operation = re.search(r"(?:query|mutation)\s+(\w+)", query)
        assert operation is not None, query
        with self._lock:
            answer: dict[str, Any] = getattr(self, f"_on_{operation[1]}")(variables)
        return answer

    def _on_Viewer(self, _: dict[str, Any]) -> dict[str, Any]:  # noqa: N802 (W&B's names)
        return {"viewer": {"id": "u", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}

    def _on_UpsertSweep(self, variables: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        self.sweep = yaml.safe_load(variables["config"])
        project = {"id": "p", "name": variables["projectName"], "entity": {"id": "e", "name": "me"}}
        return {"upsertSweep": {"sweep": {"name": "sweep1", "project": project}, "configValidationWarnings": []}}

    def _on_SweepWithRuns(self, _: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        sweep = {"id": "s", "name": "sweep1", "state": "RUNNING", "config": yaml.dump(self.sweep)}
        return {"project": {"sweep": sweep | {"runs": {"edges": []}}}}

    def _on_CreateAgent(self, _: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        agent = f"agent{len(self.agents)}"
        self.agents[agent] = []
        return {"createAgent": {"agent": {"id": agent}}}

    def _on_Heartbeat(self, variables: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        agent, busy = variables["id"], json.loads(variables["runState"])
        commands = [] if busy else [self._next(agent)]
        return {"agentHeartbeat": {"agent": {"id": agent}, "commands": json.dumps(commands)}}

    def _next(self, agent: str) -> dict[str, Any]:
        if len(self.handed_out) == self._runs:
            return {"type": "exit"}
        name = f"run{len(self.handed_out)}"
        self.handed_out[name] = self._draw(self.sweep["parameters"])
        self.agents[agent].append(name)
        arguments = {parameter: {"value": value} for parameter, value in self.handed_out[name].items()}
        return {"type": "run", "run_id": name, "program": self.sweep["program"], "args": arguments}

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        answer = self.answer

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["content-length"])))
                body = json.dumps({"data": answer(request["query"], request.get("variables") or {})}).encode()
                self.send_response(200)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                """Keep quiet."""

        return Handler
