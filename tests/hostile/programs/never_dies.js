// expect: timeout|cpuLimit
process.on("uncaughtException", () => {}); process.on("exit", () => { for (;;); }); setImmediate(() => { throw 1; });
