# expect: ok out=refused
import socket
got = []
for name in ("\0/tmp/.X11-unix/X0", "\0dbus", "/run/dbus/system_bus_socket", "/var/run/docker.sock"):
    with socket.socket(socket.AF_UNIX) as s:
        try:
            s.connect(name)
            got.append(name)
        except OSError:
            pass
print(got or "refused")
