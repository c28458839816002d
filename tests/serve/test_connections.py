"""Connections that idle, dawdle or half-close; hosts and web pages; HEAD, ids, error codes, acceptance, failure."""

from __future__ import annotations

import json
import re
import socket
import time
from contextlib import ExitStack

import httpx
import jsonschema
import pytest
import torch

pytest.importorskip("fastapi")
pytest.importorskip("openai")

from serving import MODEL, Server, request, wait_for  # noqa: E402

from specextend.serve import Settings, worker  # noqa: E402
from specextend.serve.connections import server_config  # noqa: E402
from specextend.serve.settings import hosts_of  # noqa: E402


def connect(server: Server) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", server.port))
    connection.settimeout(10)
    return connection


def read_all(connection: socket.socket) -> bytes:
    """What comes until the server closes."""
    return b"".join(iter(lambda: connection.recv(65536), b""))


def test_idle_connections_make_room(scripted):
    server, _ = scripted(settings={"max_connections": 5})
    with ExitStack() as stack:
        idle = [stack.enter_context(connect(server)) for _ in range(12)]
        assert httpx.get(f"{server.url}/health").status_code == 200
        assert idle[0].recv(10) == b"", "the one idle for the longest went first"
        idle[-1].sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"200 OK" in idle[-1].recv(1000)


def test_busy_connections_are_not_given_up_for_new_ones(scripted):
    server, _ = scripted(settings={"max_connections": 2}, pace=0.05)
    busy = [server.send(request(max_tokens=100)) for _ in range(2)]
    wait_for(lambda: server.worker.busy and server.metric("queue_length") == 1)
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{server.url}/health")
    for connection in busy:
        assert b"200 OK" in connection.recv(1000)


def test_header_that_does_not_come_ends_the_connection(scripted):
    server, _ = scripted(settings={"header_timeout_s": 0.2})
    for before in (b"", b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"):
        with connect(server) as connection:
            if before:
                connection.sendall(before)
                assert b"200 OK" in connection.recv(1000)
            begin = time.perf_counter()
            connection.sendall(b"GET /heal")
            read_all(connection)
            assert 0.1 < time.perf_counter() - begin < 3


def test_body_that_does_not_come_is_408(scripted):
    server, _ = scripted(settings={"body_timeout_s": 0.2})
    with connect(server) as connection:
        head = "POST /v1/completions HTTP/1.1", "Host: x", "Content-Type: application/json", "Content-Length: 99"
        connection.sendall("\r\n".join([*head, "", '{"model"']).encode())
        answer = read_all(connection)
    assert b" 408 " in answer and b'"code":"request_timeout"' in answer
    server, _ = scripted(settings={"body_timeout_s": 0.2}, pace=0.02)
    assert server.post(request(max_tokens=60)).status_code == 200, "the answer may take longer"


@pytest.mark.parametrize("stream", [False, True])
def test_client_that_stops_sending_gets_its_answer(stream, scripted):
    server, _ = scripted(pace=0.02)
    with server.send(request(max_tokens=30)), server.send(request(max_tokens=60, stream=stream)) as connection:
        connection.shutdown(socket.SHUT_WR)  # while the one before it is answered
        answer = read_all(connection)
    assert b"HTTP/1.1 200 OK" in answer
    assert b'"finish_reason":"length"' in answer.replace(b": ", b":") and answer.count(b"x") >= 60


def test_client_that_stops_sending_and_then_goes_frees_the_engine(scripted):
    server, engine = scripted(pace=0.1)
    connection = server.send(request(max_tokens=400))
    connection.shutdown(socket.SHUT_WR)
    wait_for(lambda: engine.rounds_run >= 3)
    connection.close()
    assert wait_for(lambda: not server.worker.busy) < 3


def test_host_of_another_name_is_refused(scripted):
    server, _ = scripted(settings={"allowed_hosts": hosts_of("127.0.0.1", has_key=False)})
    for host in ("127.0.0.1", f"localhost:{server.port}", "[::1]:8000", "LOCALHOST"):
        assert httpx.get(f"{server.url}/health", headers={"Host": host}).status_code == 200
    for host in ("evil.example", "127.0.0.1.evil.example", "", "[", "x@y:5"):
        answer = httpx.get(f"{server.url}/v1/models", headers={"Host": host})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "host_not_allowed")


def test_hosts_are_the_machines_own_unless_given_or_a_key_protects():
    assert {"localhost", "127.0.0.2"} <= set(hosts_of("127.0.0.2", has_key=False))
    assert hosts_of("0.0.0.0", has_key=True) == () == hosts_of("127.0.0.1", ["*"], has_key=False)
    assert hosts_of("127.0.0.1", ["Models.example"], has_key=False) == ("models.example",)


def test_web_pages_may_ask_where_they_are_named(scripted):
    page = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
    server, _ = scripted(settings={"allowed_origins": ("https://page.example",), "api_key": "k"})
    asked = httpx.options(f"{server.url}/v1/completions", headers=page | {"Access-Control-Request-Headers": "x"})
    assert asked.status_code == 200 and asked.headers["access-control-allow-origin"] == page["Origin"]
    refused = server.post(request(), headers=page)
    assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == page["Origin"]
    plain, _ = scripted()
    assert "access-control-allow-origin" not in plain.post(request(max_tokens=2), headers=page).headers


def test_head_is_get_without_a_body(server):
    for path in ("/health", "/v1/models", "/metrics"):
        answer = httpx.head(server.url + path)
        assert answer.status_code == 200 and answer.content == b"" and int(answer.headers["content-length"]) > 0
    assert httpx.head(f"{server.url}/v1/completions").status_code == 405


def test_every_answer_has_an_id_the_clients_own_where_it_gave_one(server):
    own = httpx.get(f"{server.url}/health", headers={"X-Request-Id": "abc-1"})
    assert own.headers["x-request-id"] == "abc-1"
    answers = [httpx.get(f"{server.url}/nothing"), server.post({}), server.post(request(max_tokens=2))]
    ids = {answer.headers["x-request-id"] for answer in answers}
    assert len(ids) == 3 and all(re.fullmatch(r"req_[0-9a-f]{32}", one) for one in ids)
    long = httpx.get(f"{server.url}/health", headers={"X-Request-Id": "x" * 200})
    assert long.headers["x-request-id"].startswith("req_")


def test_errors_of_paths_methods_and_bodies_have_codes(scripted):
    server, _ = scripted(settings={"max_body_bytes": 200})
    codes = {404: httpx.get(f"{server.url}/nothing"), 405: httpx.get(f"{server.url}/v1/completions")}
    large = json.dumps(request(prompt="x" * 300)).encode()
    codes[413] = httpx.post(
        f"{server.url}/v1/completions", content=iter([large]), headers={"Content-Type": "application/json"}
    )
    found = {status: answer.json()["error"]["code"] for status, answer in codes.items()}
    assert found == {404: "unknown_url", 405: "method_not_allowed", 413: "request_too_large"}
    assert [answer.status_code for answer in codes.values()] == list(codes)


def test_fault_in_one_of_several_is_told_with_its_place(server):
    messages = [{"role": "user", "content": "a"}, {"role": "user", "content": [{"type": "x"}]}]
    error = server.post({"model": MODEL, "messages": messages}, "/v1/chat/completions").json()["error"]
    assert error["param"] == "messages[1].content[0].type" and "valid string" not in error["message"]
    error = server.post(request(prompt=["a", {"b": 1}])).json()["error"]
    assert error["param"] == "prompt" and "prompt 1 is neither" in error["message"]


def test_fingerprint_is_that_of_the_model(server, scripted):
    answers = [server.post(request(max_tokens=2)).json() for _ in range(2)]
    assert answers[0]["system_fingerprint"] == answers[1]["system_fingerprint"]
    assert re.fullmatch("fp_[0-9a-f]{12}", answers[0]["system_fingerprint"])
    chunk = next(iter(server.client().completions.create(**request(max_tokens=2), stream=True)))
    assert chunk.system_fingerprint == answers[0]["system_fingerprint"]


def test_acceptance_is_told_per_request_and_measured_by_position(scripted):
    server, _ = scripted(per_round=3)  # each round: 2 drafted, 2 accepted, and the bonus token
    details = server.post(request(max_tokens=10)).json()["usage"]["completion_tokens_details"]
    assert (details["accepted_prediction_tokens"], details["rejected_prediction_tokens"]) == (6, 0)
    positions = [server.metric("accepted_tokens_at_position_total", position=str(place)) for place in range(3)]
    assert positions == [3, 3, 0] and server.metric("drafted_tokens_total") == 6
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *_, last = server.client().completions.create(**request(max_tokens=10), **options)
    assert last.usage.completion_tokens_details.accepted_prediction_tokens == 6


def test_acceptance_of_real_rounds_adds_up(server, bundled_engine):
    details = server.post(request(max_tokens=24)).json()["usage"]["completion_tokens_details"]
    rounds = bundled_engine.generate(request()["prompt"], 24).rounds
    assert details["accepted_prediction_tokens"] == sum(one.accepted for one in rounds)
    assert details["rejected_prediction_tokens"] == sum(one.drafted - one.accepted for one in rounds) > 0


def test_failed_device_is_seen_from_outside(scripted):
    server, engine = scripted()
    engine.fail = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    answer = server.post(request())
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "device_error")
    health = httpx.get(f"{server.url}/health")
    assert (health.status_code, health.json()) == (503, {"status": "failed"})
    engine.fail = None
    assert server.post(request()).status_code == 503, "nothing can be trusted any more"


def test_gpu_that_answers_no_more_is_lost_whatever_the_error_was(monkeypatch):
    def synchronize(device):
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    assert worker._is_lost(torch.device("cuda")) and not worker._is_lost(torch.device("cpu"))


def test_error_of_a_request_leaves_the_server_healthy(scripted):
    server, engine = scripted()
    engine.fail = RuntimeError("a bug")
    assert server.post(request()).status_code == 500
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_connections_are_no_more_than_the_limit_on_open_files_leaves(monkeypatch):
    resource = pytest.importorskip("resource")
    for files, most in {128: 64, 100_000: 512, resource.RLIM_INFINITY: 512}.items():
        monkeypatch.setattr(resource, "getrlimit", lambda _, files=files: (files, files))
        config = server_config(None, Settings(MODEL))
        assert config.http.keywords["most"] == most and 32 <= config.backlog <= 2048
        assert files < 0 or most + config.backlog < files


def test_openapi_describes_what_is_taken(server):
    """Every reference resolves, every schema is one, and real requests and errors fit theirs."""
    api = httpx.get(f"{server.url}/openapi.json").json()
    assert api["openapi"].startswith("3.1") and {"/v1/completions", "/v1/responses"} <= api["paths"].keys()
    schemas = api["components"]["schemas"]
    for reference in re.findall(r'"\$ref": "([^"]+)"', json.dumps(api)):
        assert reference.removeprefix("#/components/schemas/") in schemas
    for schema in schemas.values():
        jsonschema.Draft202012Validator.check_schema(schema)
    operations = [operation["operationId"] for path in api["paths"].values() for operation in path.values()]
    assert len(operations) == len(set(operations)) and not re.search("HTTPValidationError", json.dumps(api))

    def fits(name: str, value: dict) -> bool:
        return jsonschema.Draft202012Validator({"$ref": f"#/components/schemas/{name}", **api}).is_valid(value)

    for prompt in ("a", ["a", "b"], [1, 2], [[1], [2]]):
        assert fits("CompletionRequest", request(prompt=prompt, stop=["a"], logit_bias={"5": 1}))
    assert not fits("CompletionRequest", request(temperature=3))
    messages = [{"role": "user", "content": "a"}, {"role": "user", "content": [{"type": "text", "text": "b"}]}]
    assert fits("ChatRequest", {"model": MODEL, "messages": messages})
    assert fits("ErrorBody", server.post({}).json())
