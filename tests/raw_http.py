"""Requests as bytes, for clients that misbehave, or are many."""

import asyncio
import json


def head(body, path="/v1/completions", length=None):
    """A request as bytes."""
    length = len(body) if length is None else length
    return f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n".encode() + body


def body(**fields):
    return json.dumps({"prompt": "hello", "max_tokens": 20, "seed": 1, "ignore_eos": True} | fields).encode()


async def ask(port, fields, hang_up_after=None):
    """The text of an answer, over a connection of its own; None for one that is hung up."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(head(body(**fields)))
        await writer.drain()
        if hang_up_after is not None:
            await asyncio.sleep(hang_up_after)
            return None
        answer = b""
        while not answer.endswith((b"[DONE]\n\n\r\n0\r\n\r\n", b"}")):
            part = await reader.read(65_536)
            assert part, answer
            answer += part
        return answer.decode()
    finally:
        writer.close()


def whole(answer, stream):
    if not stream:
        return json.loads(answer.split("\r\n\r\n", 1)[1])["choices"][0]["text"]
    lines = [line for line in answer.splitlines() if line.startswith("data: {")]
    return "".join(json.loads(line[6:])["choices"][0]["text"] for line in lines)
