/** QMP against a server that speaks it as QEMU does. */
import { createServer, type Socket } from 'node:net';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { Qmp, QmpError } from '../../../src/boot/qmp.js';
import { systemClock, type Clock } from '../../../src/clock.js';
import { tempDir, type TempDir } from '../../support/tmp.js';

let dir: TempDir;
beforeEach(() => {
  dir = tempDir();
});
afterEach(() => dir.remove());

type Talk = (request: { execute: string; id: number; arguments: unknown }, to: Socket) => void;

let sockets = 0;

/** `greet` is called in place of the answer to the negotiation. */
async function serve(talk: Talk, greet?: () => void): Promise<string> {
  const path = dir.join(`q${sockets++}`);
  const server = createServer((socket) => {
    socket.on('error', () => undefined);
    socket.write('{"QMP": {"version": {}, "capabilities": []}}\r\n');
    let rest = '';
    socket.setEncoding('utf8').on('data', (text: string) => {
      rest += text;
      for (let at = rest.indexOf('\n'); at >= 0; at = rest.indexOf('\n')) {
        const request = JSON.parse(rest.slice(0, at)) as Parameters<Talk>[0];
        rest = rest.slice(at + 1);
        if (request.execute === 'qmp_capabilities' && greet !== undefined) greet();
        else if (request.execute === 'qmp_capabilities')
          socket.write(`{"return": {}, "id": ${request.id}}\r\n`);
        else talk(request, socket);
      }
    });
  });
  await new Promise<void>((resolve) => server.listen(path, resolve));
  dir.onRemove(() => void server.close());
  return path;
}

describe('QMP', () => {
  it('answers each command with its own answer, past events and in pieces', async () => {
    const held: string[] = [];
    const path = await serve(({ id, execute }, to) => {
      held.push(`{"return": {"of": "${execute}"}, "id": ${id}}\r\n`);
      if (held.length < 2) return;
      // In the other order, with an event between, cut in the middle of a line.
      const all = `${held[1]}{"event": "RESUME", "timestamp": {}}\r\n${held[0]}`;
      to.write(all.slice(0, 10));
      setImmediate(() => to.write(all.slice(10)));
    });
    const qmp = await Qmp.open(path, systemClock, 5000);
    await expect(Promise.all([qmp.command('one'), qmp.command('two')])).resolves.toEqual([
      { of: 'one' },
      { of: 'two' },
    ]);
    qmp.close();
  });

  it('rejects with what QEMU says', async () => {
    const path = await serve(({ id }, to) => {
      to.write(`{"error": {"class": "CommandNotFound", "desc": "no such thing"}, "id": ${id}}\n`);
    });
    const qmp = await Qmp.open(path, systemClock, 5000);
    const error = await qmp.command('x').catch((e: unknown) => e);
    expect(error).toBeInstanceOf(QmpError);
    expect(error).toMatchObject({ errorClass: 'CommandNotFound', message: 'no such thing' });
    qmp.close();
  });

  it('rejects what waits and what comes when the connection ends, or speaks something else', async () => {
    for (const bad of [undefined, 'no JSON\n']) {
      const path = await serve((_, to) => {
        if (bad === undefined) to.destroy();
        else to.write(bad);
      });
      const qmp = await Qmp.open(path, systemClock, 5000);
      await expect(qmp.command('x')).rejects.toThrow(/closed|not JSON/);
      await expect(qmp.command('y')).rejects.toThrow();
      await dir.remove();
      dir = tempDir();
    }
  });

  it('gives up where nobody listens', async () => {
    await expect(Qmp.open(dir.join('none'), systemClock, 50)).rejects.toMatchObject({
      kind: 'failed',
    });
    const abort = new AbortController();
    abort.abort();
    await expect(
      Qmp.open(dir.join('none'), systemClock, 60_000, abort.signal),
    ).rejects.toMatchObject({ kind: 'failed' });
  });

  it('gives up where somebody listens and says nothing', async () => {
    const abort = new AbortController();
    let isAsked = false;
    const path = await serve(
      () => undefined,
      () => {
        isAsked = true;
        abort.abort();
      },
    );
    await expect(Qmp.open(path, systemClock, 60_000, abort.signal)).rejects.toMatchObject({
      kind: 'failed',
    });
    expect(isAsked).toBe(true);
    // Without a signal it is the clock that ends it.
    const waits: number[] = [];
    const hasty: Clock = {
      ...systemClock,
      sleep: (ms, signal) => {
        waits.push(ms);
        return systemClock.sleep(20, signal);
      },
    };
    const qmp = await Qmp.open(await serve(() => undefined), hasty, 5000);
    await expect(qmp.command('stop')).rejects.toThrow('no answer to stop');
    expect(waits).toContain(30_000);
  });
});
