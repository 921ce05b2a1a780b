// Where V8 keeps what its random numbers are made of: a forked node is not to share it with its siblings.
'use strict'

const fs = require('node:fs')

/**
 * The address of V8's generator, which has no name: of all that the isolate points to, the one whose two words of state
 * move on, when something is numbered, as its algorithm (xorshift128+) has it. Each context's Math.random() is seeded
 * from it at its first use; the fork server itself does not use it.
 */
function findGenerator (isolateAddress) {
  const [ISOLATE_BYTES, STATE, MOST_STEPS] = [1 << 17, 8n, 64]
  const memory = fs.openSync('/proc/self/mem', 'r')
  const stateAt = (address) => {
    const words = new BigUint64Array(2)
    try {
      return fs.readSync(memory, words, 0, words.byteLength, address + STATE) === words.byteLength ? words : []
    } catch { // nothing is there
      return []
    }
  }
  const isolate = Buffer.alloc(ISOLATE_BYTES)
  const length = fs.readSync(memory, isolate, 0, ISOLATE_BYTES, isolateAddress)
  const states = new Map()
  for (let place = 0; place + 8 <= length; place += 8) {
    const address = isolate.readBigUInt64LE(place)
    if (address % 8n === 0n && address > 1n << 16n && address < 1n << 47n) states.set(address, stateAt(address))
  }
  new WeakSet().add({})
  for (const [address, [first, second]] of states) {
    if (first === undefined) continue
    const [now, next] = stateAt(address)
    let [a, b] = [first, second]
    for (let step = 0; step < MOST_STEPS && (a !== now || b !== next); step++) [a, b] = [b, shifted(a, b)]
    if (a === now && b === next && a !== first) {
      fs.closeSync(memory)
      return address
    }
  }
  throw new Error('V8 keeps its random numbers where they are not found')
}

/** One step of xorshift128+. */
function shifted (a, b) {
  a = BigInt.asUintN(64, a ^ (a << 23n))
  a ^= a >> 17n
  return a ^ b ^ (b >> 26n)
}

module.exports = { findGenerator }
