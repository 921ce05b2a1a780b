// expect: ok
try { process.kill(process.ppid, "SIGKILL"); } catch {} try { process.kill(1, "SIGSTOP"); } catch {} console.log("still here");
