// The fork server for JavaScript: a node that has started up to its last step before main.js, and is forked there.
//
// As fork_python.py, which explains it; here koffi calls libc. Two things make node forkable: the jail's filter for system
// calls ignores madvise(MADV_DONTFORK), with which V8 keeps its heap from children, and node runs without threads of its
// own (--single-threaded) and gets its event loop made anew in the child (uv_loop_fork). A few threads are nevertheless
// lost in the child, so it must leave before node waits for them.
'use strict'

const stderr = Object.getOwnPropertyDescriptor(process, 'stderr')
Object.defineProperty(process, 'stderr', { configurable: true, value: null }) // who only looks at it, opens it

const fs = require('node:fs')
const { inspect } = require('node:util')
const { queryObjects } = require('node:v8')
const koffi = require('/forkserver/node_modules/koffi')
const { findGenerator } = require('/forkserver/node_random.cjs')

const MESSAGE_BYTES = 1 << 18
const HEADER_AT = 64 // in an image
const GENERATOR_BYTES = 24 // of V8: a seed, which has been used, and two words of state
const [REHEARSALS, PIPE_BYTES] = [20, 65536]
const SMALL_MODULE = '/forkserver/node_random.cjs'
const [PROT_READ, PROT_WRITE, PROT_EXEC] = [1, 2, 4]
const MAPPING = 2 | 0x20 | 0x100000 // private, anonymous, fixed and not in place of another
const [PR_CAPBSET_DROP, PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL] = [24, 47, 4]
const MNT_DETACH = 2
const [O_RDWR, O_PATH, O_CLOEXEC, F_GETFD, F_DUPFD_CLOEXEC] = [2, 0x200000, 0x80000, 1, 1030]

const self = koffi.load(null)
const libc = {}
for (const declaration of [
  'int dup3(int, int, int)', 'int close(int)', 'int pipe(void *)', 'int umount2(str, int)',
  'void *mmap(uintptr_t, size_t, int, int, int, long)', 'int mprotect(uintptr_t, size_t, int)',
  'int prctl(int, unsigned long, unsigned long, unsigned long, unsigned long)', 'void _exit(int)',
  'int memfd_create(str, uint)', 'int open(str, int)', 'int fcntl(int, int, int)', 'void *dlsym(uintptr_t, str)',
  'void *uv_default_loop()', 'int uv_loop_fork(void *)'
]) {
  libc[declaration.match(/(\w+)\(/)[1]] = self.func(declaration)
}
// Node's own interface for embedders, by the names that its compiler gives them
libc.currentIsolate = self.func('_ZN2v87Isolate10GetCurrentEv', 'void *', [])
libc.currentContext = self.func('_ZN2v87Isolate17GetCurrentContextEv', 'void *', ['void *'])
libc.currentEnvironment = self.func('_ZN4node21GetCurrentEnvironmentEN2v85LocalINS0_7ContextEEE', 'void *', ['void *'])
libc.atExit = self.func('_ZN4node6AtExitEPNS_11EnvironmentEPFvPvES2_', 'void', ['void *', 'void *', 'uintptr_t'])

/** A function of libc; throws what it says has failed. */
function call (name, ...values) {
  const answer = libc[name](...values)
  if (answer === -1) throw new Error(`${name} failed with error ${koffi.errno()}`)
  return answer
}

/** Forks a child for every request. Returns in the child that is to be the program, with its arguments. */
function serve (fs) {
  const { base, setup, perform, job, beginning } = begin()
  try {
    perform(setup.shared_at)
    call('uv_loop_fork', libc.uv_default_loop())
    if (perform(setup.request_at + beginning()) === 0) return []
    const [place, length] = new Int32Array(koffi.view(job, 8))
    return JSON.parse(Buffer.from(koffi.view(job, place + length)).toString('utf8', place))
  } catch (failure) {
    try { fs.writeSync(base, `failed: ${failure.message}`) } catch {} // where this is no child
    fs.writeSync(2, `Error: ${failure.message}`)
    return libc._exit(1)
  }
}

/** Takes the set-up and becomes what is forked. */
function begin () {
  const message = Buffer.alloc(MESSAGE_BYTES)
  const setup = JSON.parse(message.toString('utf8', 0, fs.readSync(0, message)))
  const [shared, request] = [part(setup.shared_at, setup.size), part(setup.request_at, setup.size)]
  const job = mapped(setup.job_at, setup.job_bytes)
  const perform = performer(setup)
  const generator = findGenerator(BigInt(koffi.address(libc.currentIsolate())))
  rehearse(() => {
    fs.writeSync(0, `maps\n${fs.readFileSync('/proc/self/maps')}`)
    fs.readSync(0, request)
    perform(setup.request_at)
  })
  for (let capability = 0; libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) === 0;) capability++
  call('prctl', PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) // a program that is started has no rights
  const { base, inherited } = reserve(Buffer.from(setup.first_process, 'hex'))
  becomeProgram()
  call('umount2', '/forkserver', MNT_DETACH) // for all children at once: the kernel waits for all processors each time
  fs.writeSync(0, ['ready', base, generator, GENERATOR_BYTES, ...inherited].join(' '))
  fs.readSync(0, shared)
  perform(setup.shared_at + shared.readInt32LE(HEADER_AT))
  return { base, setup, perform, job, beginning: () => request.readInt32LE(HEADER_AT) }
}

/** Memory at an address that the server has chosen, with some content. */
function part (address, size, hex = '') {
  const view = Buffer.from(koffi.view(mapped(address, size), size))
  view.write(hex, 'hex')
  return view
}

function mapped (address, size) {
  const memory = libc.mmap(address, size, PROT_READ | PROT_WRITE, MAPPING, -1, 0)
  if (Number(koffi.address(memory)) !== address) throw new Error(`${address} is taken: error ${koffi.errno()}`)
  return memory
}

/** A function that makes the system calls of a program, from an address on. */
function performer ({ code_at: codeAt, size, code }) {
  part(codeAt, size, code)
  call('mprotect', codeAt, size, PROT_READ | PROT_EXEC)
  const make = koffi.decode(BigInt(codeAt), koffi.proto('long makeCalls(uintptr_t, void *)'))
  const fork = libc.dlsym(0, 'fork')
  return (address) => {
    const answer = make(address, fork)
    if (answer >= codeAt) throw new Error(answer)
    return answer
  }
}

/** Puts what is needed for ever behind what libuv and node have open, where no request's descriptors will be. */
function reserve (firstProcess) {
  const inherited = fs.readdirSync('/proc/self/fd').map(Number).filter((number) => number > 2 && isOpen(number))
  const base = Math.max(2, ...inherited) + 1
  const file = call('memfd_create', 'init', 1) // MFD_CLOEXEC
  fs.writeSync(file, firstProcess)
  const opened = [
    call('open', '/proc/self/ns/pid', O_CLOEXEC),
    call('open', `/proc/self/fd/${file}`, O_PATH | O_CLOEXEC),
    call('open', '/dev/null', O_RDWR | O_CLOEXEC)
  ]
  fs.fchmodSync(file, 0o111) // nobody may read it: so no process can look into one that runs it
  const aside = opened.map((number) => call('fcntl', number, F_DUPFD_CLOEXEC, base + 2 * opened.length))
  for (const number of [file, ...opened]) libc.close(number) // what is open for writing cannot be executed
  aside.forEach((number, place) => call('dup3', number, base + place, O_CLOEXEC))
  for (const number of aside) libc.close(number)
  while (call('open', '/dev/null', O_CLOEXEC) < base); // fills what is free below, where descriptors would be let in
  libc.close(base + aside.length)
  return { base, inherited }
}

/** Whether it is: the descriptor that the list of them was read from is not any more. */
function isOpen (number) {
  return libc.fcntl(number, F_GETFD, 0) !== -1
}

/**
 * Does what nearly every program does, so that it need not be loaded and compiled in each child; so often that V8 compiles
 * it better here, not in each child; and once more after `settle`, so that what it needs is in memory.
 */
function rehearse (settle) {
  const { Console } = require('node:console')
  const { Socket } = require('node:net')
  const [end, other] = pipe()
  const socket = new Socket({ fd: other, readable: false, writable: true }) // as process.stdout is, when it is a pipe
  const console = new Console(socket)
  const once = () => {
    delete require.cache[SMALL_MODULE]
    require(SMALL_MODULE)
    console.log('text')
    console.log('%s', 1, { a: ['b', 2n, null] }, new Map([[1, new Error('rehearsal')]]))
    process._tickCallback() // what is still to be done is not the program's
    fs.readSync(end, Buffer.alloc(PIPE_BYTES), 0, PIPE_BYTES, null)
  }
  for (let count = 0; count < REHEARSALS; count++) once()
  collectGarbage()
  settle()
  once()
  delete require.cache[SMALL_MODULE]
  socket.unref()
  socket._handle.close() // which leaves the program nothing to do, as socket.destroy() would
  fs.closeSync(end)
  Object.defineProperty(process, 'stderr', stderr)
}

/** V8 does so before it counts objects. With gc() of a new context, it would choose the seed of all later contexts. */
function collectGarbage () {
  const { emitWarning } = process
  process.emitWarning = () => {} // counting is experimental, we know
  queryObjects(class None {})
  process.emitWarning = emitWarning
}

/** The ends of a new pipe, to read from and to write to. */
function pipe () {
  const ends = Buffer.alloc(8)
  call('pipe', ends)
  return [ends.readInt32LE(0), ends.readInt32LE(4)]
}

/** Becomes, but for the fork, a node like one that has just been started. */
function becomeProgram () {
  Object.defineProperty(process, 'pid', { ...Object.getOwnPropertyDescriptor(process, 'pid'), value: 2 })
  // Its parent is outside of its pid namespace. With 0 for it, a signal would reach one's own process group.
  Object.defineProperty(process, 'ppid', { ...Object.getOwnPropertyDescriptor(process, 'ppid'), value: 1 })
  leaveEarly()
}

/**
 * Ends the process when its program is through: node itself would wait for threads that did not survive the fork. Where
 * node has something to print after 'exit' was emitted (an error that nobody caught; an await that nothing settles), it
 * goes on, and ends where embedders are told that it does.
 */
function leaveEarly () {
  const UNSETTLED_AWAIT = 13
  const environment = libc.currentEnvironment(libc.currentContext(libc.currentIsolate()))
  const exit = libc.dlsym(0, '_exit')
  process.reallyExit = (code) => libc._exit(Number(code ?? 0))
  const { emit } = process
  let uncaught = false
  process.emit = function (event, ...values) {
    if (event === 'uncaughtException') {
      const handled = failing(() => Reflect.apply(emit, this, [event, ...values]))
      uncaught = !handled
      return handled
    }
    if (event !== 'exit' || !process._exiting) return Reflect.apply(emit, this, [event, ...values])
    let code = 1
    try {
      const handled = Reflect.apply(emit, this, [event, ...values])
      code = process.exitCode ?? values[0] ?? 0
      if (!uncaught && code !== UNSETTLED_AWAIT) libc._exit(code)
      return handled
    } finally {
      libc.atExit(environment, exit, code)
    }
  }
  process.emit('rehearsal') // compiles it
}

/** What a handler of uncaught errors gives; if it throws itself, node ends there with a code of its own. */
function failing (handle) {
  const HANDLER_FAILED = 7
  try {
    return handle()
  } catch (error) {
    fs.writeSync(2, `${inspect(error)}\n\nNode.js ${process.version}\n`)
    return libc._exit(HANDLER_FAILED)
  }
}

module.exports = { serve }
