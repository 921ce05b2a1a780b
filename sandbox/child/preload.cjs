// What every node that is started ahead of its job loads first (--require), and its workers too.
'use strict'

const { isMainThread } = require('node:worker_threads')

if (isMainThread) {
  const fs = require('node:fs')
  const ahead = process.env.FORK_SERVER ? require('/forkserver/fork_node.cjs').serve : takeJob
  delete process.env.FORK_SERVER
  process.execArgv.length = 0
  for (const path of Object.keys(require.cache)) delete require.cache[path]
  module.children.length = 0
  process.argv.push(...ahead(fs))
} else if (process.ppid === 0) { // as fork_node.cjs has it in the main thread
  Object.defineProperty(process, 'ppid', { ...Object.getOwnPropertyDescriptor(process, 'ppid'), value: 1 })
}

/** Waits for a job, with the descriptors where fork_python.py leaves them. Writes its files and gives its arguments. */
function takeJob (fs) {
  const [report, file, digits, started] = [3, 4, Buffer.alloc(24), Buffer.alloc(24)]
  fs.writeSync(report, 'ready')
  const job = Buffer.alloc(Number(digits.toString('latin1', 0, fs.readSync(report, digits))))
  if (job.length === 0) process.reallyExit(0) // not wanted any more
  fs.readSync(file, job, 0, job.length, 0)
  fs.closeSync(file)
  const { args, files } = JSON.parse(job.toString())
  try {
    for (const [name, content] of Object.entries(files)) {
      const folder = name.slice(0, Math.max(0, name.lastIndexOf('/')))
      if (folder) fs.mkdirSync(folder, { recursive: true })
      fs.writeFileSync(name, content, { flag: 'wx' })
    }
  } catch (failure) {
    fs.writeSync(report, `failed: ${failure.message}`)
    process.reallyExit(1)
  }
  started.write('started ')
  started.writeBigInt64LE(process.hrtime.bigint(), 16) // after the seconds
  fs.writeSync(report, started)
  fs.closeSync(report)
  return args
}
