"""What an NBD server does with what libnbd can ask of it, one JSON object: name -> outcome.

usage: conformance.py URI  (a writable export of at least 4 MiB that reads as zeros behind 1 MiB)
"""
import errno, json, sys
import nbd

uri = sys.argv[1]
out = {}


def attempt(function, *args):
    try:
        value = function(*args)
    except nbd.Error as error:
        return error.errno or "error"
    return "ok" if value is None or value == 0 or isinstance(value, (bytes, bytearray)) else value


def connected(**settings):
    h = nbd.NBD()
    h.set_strict_mode(0)
    h.add_meta_context("base:allocation")
    for name, value in settings.items():
        getattr(h, "set_" + name)(value)
    h.connect_uri(uri)
    return h


h = connected()
size = h.get_size()
out["size"] = size
for name in ["is_read_only", "can_flush", "can_fua", "can_zero", "can_fast_zero", "can_trim", "can_cache", "can_df", "can_multi_conn", "is_rotational"]:
    out[name] = getattr(h, name)()
out["structured"] = h.get_structured_replies_negotiated()
out["protocol"] = h.get_protocol()
out["allocation context"] = h.can_meta_context("base:allocation")
out["minimum block"] = h.get_block_size(nbd.SIZE_MINIMUM)
out["maximum block >= 32 MiB"] = h.get_block_size(nbd.SIZE_MAXIMUM) >= 1 << 25

pattern = bytes(range(256)) * 20
out["unaligned write"] = attempt(h.pwrite, pattern, 12305)
out["unaligned read back"] = h.pread(len(pattern), 12305) == pattern
other = connected()
out["other connection sees it"] = other.pread(len(pattern), 12305) == pattern
out["write FUA"] = attempt(h.pwrite, pattern, 0, nbd.CMD_FLAG_FUA)
out["flush"] = attempt(h.flush)
out["zero NO_HOLE"] = attempt(h.zero, 65536, 100000, nbd.CMD_FLAG_NO_HOLE)
out["zero NO_HOLE reads"] = h.pread(65536, 100000) == bytes(65536)
out["write before zero"] = attempt(h.pwrite, pattern, 200001)
out["zero unaligned"] = attempt(h.zero, 3000, 200100)
out["zero unaligned reads"] = h.pread(len(pattern), 200001) == pattern[:99] + bytes(3000) + pattern[3099:]
out["zero FUA"] = attempt(h.zero, 4096, 4096, nbd.CMD_FLAG_FUA)
out["trim"] = attempt(h.trim, 1 << 20, 1 << 20)
out["trim FUA"] = attempt(h.trim, 4096, 4096, nbd.CMD_FLAG_FUA)
out["cache"] = attempt(h.cache, 65536, 0)
out["zero length write"] = attempt(h.pwrite, b"", 0)
out["zero length trim"] = attempt(h.trim, 0, 0)
out["zero length zero"] = attempt(h.zero, 0, 0)
out["alive after zero lengths"] = h.pread(512, 0) == (pattern * 1)[:512]
for name, call in {
    "read past end": lambda: h.pread(512, size - 256),
    "read at end": lambda: h.pread(1, size),
    "read far": lambda: h.pread(512, (1 << 63) - 1024),
    "write past end": lambda: h.pwrite(bytes(512), size - 256),
    "zero past end": lambda: h.zero(512, size - 256),
    "trim past end": lambda: h.trim(512, size - 256),
    "cache past end": lambda: h.cache(512, size - 256),
    "status past end": lambda: h.block_status(512, size, lambda *a: 0),
    "read flag 64": lambda: h.pread(512, 0, 64),
    "read NO_HOLE": lambda: h.pread(512, 0, nbd.CMD_FLAG_NO_HOLE),
    "write DF": lambda: h.pwrite(bytes(512), 0, nbd.CMD_FLAG_DF),
    "trim NO_HOLE": lambda: h.trim(512, 0, nbd.CMD_FLAG_NO_HOLE),
    "flush REQ_ONE": lambda: h.flush(nbd.CMD_FLAG_REQ_ONE),
    "read DF": lambda: h.pread(65536, 0, nbd.CMD_FLAG_DF),
    "alive at the end": lambda: h.pread(512, 0),
}.items():
    out[name] = attempt(call)

entries = []
h.block_status(size, 0, lambda ctx, off, e, err: entries.extend(e) or 0)
out["status covers"] = sum(entries[0::2]) <= size and all(l > 0 for l in entries[0::2])
one = []
h.block_status(size, 0, lambda ctx, off, e, err: one.extend(e) or 0, nbd.CMD_FLAG_REQ_ONE)
out["status REQ_ONE entries"] = len(one) // 2

buffers = [nbd.Buffer(65536) for _ in range(200)]
cookies = [h.aio_pread(b, (i % 32) * 65536) for i, b in enumerate(buffers)]
while h.aio_in_flight() > 0:
    h.poll(-1)
out["200 in flight"] = all(h.aio_command_completed(c) for c in cookies)
h.shutdown()

plain = connected(request_structured_replies=False)
out["simple read"] = plain.pread(512, 0) == other.pread(512, 0)
out["simple error"] = attempt(plain.pread, 512, size)
out["simple status"] = plain.can_meta_context("base:allocation") if plain.get_structured_replies_negotiated() else "no structured"
for flags in (0, 1, 2, 3):
    old = connected(handshake_flags=flags)
    out["handshake flags %d" % flags] = old.get_size() == size and old.pread(512, 0) == other.pread(512, 0)

options = nbd.NBD()
options.set_opt_mode(True)
options.connect_uri(uri)
out["list context base:"] = []
options.add_meta_context("base:")
options.opt_list_meta_context(lambda name: out["list context base:"].append(name) or 0)
out["info"] = attempt(options.opt_info)
out["info size"] = options.get_size() == size
out["go"] = attempt(options.opt_go)
out["read after go"] = options.pread(512, 0) == other.pread(512, 0)
aborted = nbd.NBD()
aborted.set_opt_mode(True)
aborted.connect_uri(uri)
out["abort"] = attempt(aborted.opt_abort)
print(json.dumps(out))
