// expect: ok out=refused
const net = require("net"); const s = net.connect(8080, "127.0.0.1"); s.on("error", () => console.log("refused")); s.on("connect", () => { console.log("open"); process.exit(); });
