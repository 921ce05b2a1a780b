// expect: ok out=refused
const {spawnSync} = require("child_process"); const r = spawnSync("/bin/sh", ["-c", "cat /etc/shadow"]); console.log(r.error || r.status ? "refused" : String(r.stdout));
