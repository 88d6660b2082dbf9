"""Stands in for an interpreter whose words, pipes and signals go to a process that `forked_command` forks."""

import array
import json
import os
import signal
import socket
import sys

address, *words = sys.argv[1:]
if words[:1] == ["-u"]:  # what a forked process prints is flushed line by line
    words = words[1:]
if words and words[0].startswith("-") and words[0] not in ("-m", "-c"):
    os.execv(sys.executable, [sys.executable, *words])
with socket.socket(socket.AF_UNIX) as forker:
    forker.connect(address)
    asked = json.dumps({"words": words, "cwd": os.getcwd(), "env": dict(os.environ)}).encode()
    files = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))
    forker.sendmsg([len(asked).to_bytes(8, "big")], [files])
    forker.sendall(asked)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda number, _: forker.send(bytes([number])))
    ended = forker.recv(4)
if len(ended) < 4:
    sys.exit("forked_stand_in: the process that forks has gone")
if (code := int.from_bytes(ended, "big", signed=True)) < 0:
    if -code != signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)
