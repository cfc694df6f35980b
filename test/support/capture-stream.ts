import { Writable } from 'node:stream';

/** A Writable that keeps what is written; `fail` makes every further write end with that error. */
export class CaptureStream extends Writable {
  readonly isTTY: boolean;
  fail: Error | undefined;
  private readonly parts: Buffer[] = [];

  constructor(isTTY = false) {
    super({ decodeStrings: true });
    this.isTTY = isTTY;
  }

  override _write(chunk: Buffer, _encoding: string, done: (error?: Error | null) => void): void {
    if (this.fail !== undefined) {
      done(this.fail);
      return;
    }
    this.parts.push(chunk);
    done();
  }

  // What a tty.WriteStream has besides, as the escape sequences that it would send.
  cursorTo(column: number): boolean {
    return this.write(`\u001b[${column + 1}G`);
  }
  moveCursor(_dx: number, dy: number): boolean {
    return this.write(`\u001b[${Math.abs(dy)}${dy < 0 ? 'A' : 'B'}`);
  }
  clearLine(): boolean {
    return this.write('\u001b[K');
  }

  get text(): string {
    return Buffer.concat(this.parts).toString('utf8');
  }

  get lines(): readonly string[] {
    return this.text.split('\n').filter((line) => line !== '');
  }
}
