# expect: ok out=refused
import socket
got = []
for family, kind in ((socket.AF_INET, socket.SOCK_STREAM), (socket.AF_INET6, socket.SOCK_STREAM), (socket.AF_INET, socket.SOCK_DGRAM)):
    for address in ("127.0.0.1", "10.0.0.1", "8.8.8.8"):
        try:
            with socket.socket(family, kind) as s:
                s.settimeout(1)
                s.connect((address if family == socket.AF_INET else "::1", 8080))
                got.append(address)
        except OSError:
            pass
for make in (lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW), lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW),
             lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1), lambda: socket.getaddrinfo("example.com", 80)):
    try:
        make()
        got.append("made")
    except OSError:
        pass
print(got or "refused")
