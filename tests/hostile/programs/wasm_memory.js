// expect: error|memoryLimit|ok
const m = new WebAssembly.Memory({initial: 1, maximum: 65536}); try { for (;;) { m.grow(1000); new Uint8Array(m.buffer).fill(1); } } catch (e) { console.log(e.name); process.exit(1); }
