# Runs source text for the agent in one persistent namespace.
#
# Messages are a little-endian u32 length and that many bytes of JSON. On the work socket comes
# {"code", "expression"}; the answer is {"result"} or {"error"}, with "numpy" once it is imported. On the
# control socket comes {"seed", "sandbox_id"}; it is answered {} by a thread of its own, so that a
# copy of a machine whose code is in the middle of something is reseeded all the same.
# Standard output and error belong to the code: the agent reads them.

import sys


def _forkd_start():
    import ast
    import json
    import linecache
    import os
    import signal
    import socket
    import struct
    import threading
    import traceback
    import types

    LIMIT = 16 << 20
    work_fd, control_fd = (int(n) for n in os.environ.pop("FORKD_RUNTIME_FDS").split(","))
    for fd in (work_fd, control_fd):
        os.set_inheritable(fd, False)
    own_pid = os.getpid()

    class Channel:
        def __init__(self, fd):
            self.socket = socket.socket(fileno=fd)
            self.waiting = bytearray()

        def receive(self):
            # What has come stays in `waiting` if an interrupt ends the wait.
            while True:
                if len(self.waiting) >= 4:
                    end = 4 + struct.unpack_from("<I", self.waiting)[0]
                    if len(self.waiting) >= end:
                        message = json.loads(bytes(self.waiting[4:end]).decode())
                        del self.waiting[:end]
                        return message
                piece = self.socket.recv(1 << 16)
                if not piece:
                    os._exit(0)
                self.waiting += piece

        def send(self, message):
            data = json.dumps(message).encode()
            self.socket.sendall(struct.pack("<I", len(data)) + data)

    work, control = Channel(work_fd), Channel(control_fd)

    # The code's namespace is a module of its own, so that pickle, dataclasses and the like find it.
    main = types.ModuleType("__main__")
    main.__builtins__ = __builtins__
    runner_module = sys.modules["__main__"]
    sys.modules["__main__"] = main
    namespace = main.__dict__
    state = {"running": False, "count": 0, "loop": None, "keep": runner_module}
    sys.argv = [""]

    for stream in (sys.stdout, sys.stderr):
        try:
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
        except AttributeError:
            pass

    def interrupted(signum, frame):
        if state["running"]:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupted)

    def reseed(message):
        seed = bytes.fromhex(message["seed"])
        os.environ["FORKD_SANDBOX_ID"] = message["sandbox_id"]
        modules = sys.modules
        if "random" in modules:
            modules["random"].seed(seed)
        if "numpy" in modules and "numpy.random" in modules:
            words = struct.unpack("<%dI" % (len(seed) // 4), seed)
            modules["numpy.random"].seed(list(words))
        if "tempfile" in modules:
            modules["tempfile"]._name_sequence = None
        if "uuid" in modules:
            modules["uuid"]._last_timestamp = None
        if "_ssl" in modules:
            # OpenSSL keeps a generator in this process; mixing something in makes it reseed.
            modules["_ssl"].RAND_add(seed, float(len(seed)))

    def obey():
        while True:
            message = control.receive()
            try:
                reseed(message)
                control.send({})
            except Exception:
                control.send({"error": traceback.format_exc()})

    threading.Thread(target=obey, name="forkd-control", daemon=True).start()

    await_allowed = getattr(ast, "PyCF_ALLOW_TOP_LEVEL_AWAIT", 0)
    COROUTINE = 0x80

    def run(code, scope):
        value = eval(code, scope)
        if code.co_flags & COROUTINE:
            if state["loop"] is None:
                import asyncio

                state["loop"] = asyncio.new_event_loop()
                asyncio.set_event_loop(state["loop"])
            value = state["loop"].run_until_complete(value)
        return value

    def evaluate(source, expression):
        state["count"] += 1
        name = "<eval-%d>" % state["count"]
        linecache.cache[name] = (len(source), None, source.splitlines(True), name)
        flags = ast.PyCF_ONLY_AST | await_allowed
        if expression:
            scope = {"__builtins__": __builtins__}
            try:
                import numpy

                scope["numpy"] = scope["np"] = numpy
            except Exception:
                pass
            value = run(compile(source, name, "eval", await_allowed), scope)
            return repr(value)
        scope = namespace
        if "numpy" in sys.modules:
            # Clients of expression-only agents expect both names.
            for alias in ("numpy", "np"):
                scope.setdefault(alias, sys.modules["numpy"])
        tree = compile(source, name, "exec", flags)
        last = None
        if tree.body and isinstance(tree.body[-1], ast.Expr):
            last = ast.Expression(tree.body.pop().value)
        if tree.body:
            run(compile(tree, name, "exec", await_allowed), scope)
        if last is None:
            return None
        return repr(run(compile(last, name, "eval", await_allowed), scope))

    def alone():
        # This thread and the one that obeys; threads that Python does not know of count too.
        try:
            if len(os.listdir("/proc/self/task")) > 2:
                return False
        except OSError:
            return False
        timers = (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF)
        return all(signal.getitimer(timer)[0] == 0 for timer in timers)

    def describe(error):
        # The frames of this runner are of no interest to who wrote the code.
        trace = error.__traceback__
        while trace is not None and not trace.tb_frame.f_code.co_filename.startswith("<eval-"):
            trace = trace.tb_next
        return "".join(traceback.format_exception(type(error), error, trace))

    while True:
        request = work.receive()
        answer = {}
        try:
            try:
                state["running"] = True
                result = evaluate(request["code"], request["expression"])
            finally:
                state["running"] = False
            if result is not None:
                if len(result) > LIMIT:
                    result = result[:LIMIT] + "... [%d more characters dropped]" % (len(result) - LIMIT)
                answer["result"] = result
        except BaseException as error:
            try:
                answer["error"] = describe(error)
            except BaseException as second:
                answer["error"] = "%s (its traceback cannot be shown: %s)\n" % (type(error).__name__, type(second).__name__)
            error = second = None
        if os.getpid() != own_pid:
            # The code forked and its child came back here: this is not the runtime.
            os._exit(0)
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except Exception:
                pass
        numpy = sys.modules.get("numpy")
        if numpy is not None:
            answer["numpy"] = str(getattr(numpy, "__version__", "unknown"))
        answer["alone"] = alone()
        work.send(answer)


_forkd_start()
