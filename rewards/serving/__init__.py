"""A reward on the other end of a socket: its server, its client, and a process of its own.

`server.create_app` serves rewards over HTTP, `client.RemoteReward` is such a reward on this side,
and `worker.start_worker` runs one in a process, or virtual environment, of its own. What travels is
safetensors (`wire`), never pickle. Reading order: `wire`, `calls`, `batching`, `server`; `balance`,
`client`; `worker`, `child`.
"""
